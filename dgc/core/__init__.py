"""Select, quantise, pack, encode: tensors in, tensors out."""

from dgc.core.select import num_selected, select_topk
from dgc.core.sparse import Sparse, SparseBatch

__all__ = ["Sparse", "SparseBatch", "num_selected", "select_topk"]
