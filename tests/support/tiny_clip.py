"""A folder of a small CLIP with random weights, in the layout of transformers."""

import json
from pathlib import Path

from diffjax.models.clip.network import clip_vision
from diffjax.models.clip.published import FAMILY as VISION
from diffjax.models.clip_text.network import ClipText
from diffjax.models.clip_text.published import FAMILY as TEXT
from diffjax.pretrained.folders import write_folder
from tests.models.published.test_families import drawn
from tests.support.vocabularies import write_clip


def write_tiny_clip(folder: Path, **preprocessing: object) -> Path:
    """Images of 8x8 in four patches, texts of up to nine tokens, embeddings of six numbers."""
    write_clip(folder)
    vocabulary = len(json.loads((folder / "vocab.json").read_text()))
    vision = clip_vision(8, 1, 2, num_features=6, grid=2, patch=4)
    text = ClipText(8, 1, 2, num_features=6, vocabulary=vocabulary, length=9)
    state = VISION.to_theirs(drawn(VISION, vision), vision)
    state |= TEXT.to_theirs(drawn(TEXT, text), text)
    config = {
        "model_type": "clip",
        "vision_config": {"num_attention_heads": 2},
        "text_config": TEXT.config.entries(text) if TEXT.config else {},
    }
    write_folder(folder, state, config, name="model")
    if preprocessing:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder
