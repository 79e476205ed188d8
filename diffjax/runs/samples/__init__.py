"""From a run to samples: `Model`, recipes, and what they are drawn with."""
