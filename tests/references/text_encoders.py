"""Outputs of text encoders of transformers for drawn parameters, stored as arrays.

    python -m tests.references.text_encoders     # writes text_encoders.npz beside this file

It needs torch and transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.models.bert.published import FAMILY as BERT
from diffjax.models.clip_text.published import BARE as BARE_CLIP_TEXT
from diffjax.models.clip_text.published import FAMILY as CLIP_TEXT
from diffjax.models.qwen3.published import FAMILY as QWEN3
from diffjax.models.t5.published import FAMILY as T5
from diffjax.pretrained.family import Family
from tests.references.dit import drawn

FILE = Path(__file__).parent / "text_encoders.npz"
_CLIP = {"vocab_size": 13, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_CLIP |= {"max_position_embeddings": 9, "bos_token_id": 0, "pad_token_id": 1}
_T5 = {"vocab_size": 13, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 24}
# Distances in each kind of bucket, for texts of this length.
_T5 |= {"relative_attention_num_buckets": 12, "relative_attention_max_distance": 20}


def parameters(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Parameters by the names of transformers; scales of norms are around 1.

    With smaller ones, attention is nearly uniform, and its gradients are differences of large
    numbers.
    """
    return {
        name: 1 + x if "norm" in name.lower() and name.endswith("weight") else x
        for name, x in drawn(shapes).items()
    }


@dataclass(frozen=True)
class Case:
    """A small encoder, and texts of unlike lengths.

    Attributes:
        family: ours.
        kind: the class of transformers.
        config: its settings.
        lengths: the number of tokens of each text; the last one is `end`, and `pad` follows.
        has_mask: whether the encoder is given which tokens are padding.
    """

    family: Family
    kind: str
    config: Mapping[str, Any]
    end: int
    pad: int
    lengths: tuple[int, ...] = (7, 2, 5)
    has_mask: bool = True

    @property
    def mask(self) -> np.ndarray:
        """`[B, T]`."""
        return np.arange(max(self.lengths)) < np.array(self.lengths)[:, None]

    @property
    def ids(self) -> np.ndarray:
        """`[B, T]`; no end within a text."""
        random = np.random.default_rng(0)
        ids = random.integers(6, 12, self.mask.shape).astype(np.int32)
        ids = np.where(self.mask, ids, self.pad)
        ids[np.arange(len(ids)), np.array(self.lengths) - 1] = self.end
        return ids

    @property
    def network(self) -> Any:
        """Ours, by the config of theirs."""
        assert self.family.config is not None
        settings = self.family.config.settings(self.config, "here")
        features = self.config.get("projection_dim", 0) if "Projection" in self.kind else 0
        return self.family.network(**settings, **({"num_features": features} if features else {}))

    def theirs(self) -> Any:
        """The network of transformers, with drawn parameters."""
        import torch
        import transformers

        kind = getattr(transformers, self.kind)
        network = kind(kind.config_class(**self.config)).eval()
        shapes = {name: tuple(x.shape) for name, x in network.named_parameters()}
        state = {name: torch.tensor(x) for name, x in parameters(shapes).items()}
        network.load_state_dict(state, strict=False)  # Those of T5 have its embeddings twice.
        return network

    def outputs(self, network: Any) -> dict[str, Any]:
        """The states of all layers and the pooled vector, as tensors."""
        import torch

        inputs = {"input_ids": torch.tensor(self.ids)}
        if self.has_mask:
            inputs["attention_mask"] = torch.tensor(self.mask)
        found = network(**inputs, output_hidden_states=True)
        pooled = next((found[n] for n in ("text_embeds", "pooler_output") if n in found), None)
        # The last of them is `last` in some encoders, and before the final norm in others.
        named = {f"hidden_{i}": x for i, x in enumerate(found.hidden_states[:-1])}
        if self.kind == "BertModel":
            kept = torch.tensor(self.mask)[..., None]
            pooled = (found.last_hidden_state * kept).sum(1) / kept.sum(1)
        named |= {} if pooled is None else {"pooled": pooled}
        last = "last_hidden_state"  # without one, the last of all is after the final norm
        return named | {"last": found[last] if last in found else found.hidden_states[-1]}


CASES = {
    # As in Stable Diffusion 1: padded by the end, which is the largest id; without a mask.
    "clip-l": Case(
        BARE_CLIP_TEXT, "CLIPTextModel", _CLIP | {"intermediate_size": 64, "eos_token_id": 2},
        end=12, pad=12, has_mask=False,
    ),
    "clip-bigg": Case(
        CLIP_TEXT, "CLIPTextModelWithProjection",
        _CLIP | {
            "intermediate_size": 37, "eos_token_id": 5, "projection_dim": 6, "hidden_act": "gelu"
        },
        end=5, pad=0,
    ),
    "t5-v1.1": Case(
        T5, "T5EncoderModel", _T5 | {"d_kv": 6, "feed_forward_proj": "gated-gelu"}, end=1, pad=0,
        lengths=(41, 3, 30),
    ),
    "t5": Case(T5, "T5EncoderModel", _T5 | {"d_kv": 8, "feed_forward_proj": "relu"}, end=1, pad=0),
    "bert": Case(
        BERT, "BertModel",
        {**_CLIP, "intermediate_size": 64, "type_vocab_size": 2, "layer_norm_eps": 1e-12},
        end=5, pad=0,
    ),
    # Two heads of queries for one of keys; as a text encoder, it reads from left to right.
    "qwen3": Case(
        QWEN3, "Qwen3ForCausalLM",
        {
            "vocab_size": 13, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 24,
            "tie_word_embeddings": True,
        },
        end=5, pad=0,
    ),
}  # fmt: skip


def main() -> None:
    """Evaluates the networks of transformers."""
    import torch

    found = {}
    for name, case in CASES.items():
        with torch.inference_mode():
            for key, x in case.outputs(case.theirs()).items():
                found[f"{name}/{key}"] = x.numpy()
    np.savez_compressed(FILE, **found)


if __name__ == "__main__":
    main()
