"""How fast a run is: throughput, the loop's time, compiled programs, and plans."""
