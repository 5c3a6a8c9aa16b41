"""Products: linear maps, matrix products, einsum, attention. A sum over an axis ties both sides."""

from metamerge.structure.axes import Axis
from metamerge.structure.rules.call import Call


def linear(call: Call) -> list[Axis]:
    """``y = x W^T + b``: columns of W meet the last axis of x, rows make the last axis of y."""
    x, weight, bias = call.tensor("input"), call.tensor("weight"), call.optional("bias")
    call.unify(x[-1], weight[-1])
    if bias:
        call.unify(bias[0], weight[0])
    return [*x[:-1], *weight[:-1]]


def matmul(call: Call) -> list[Axis]:
    """``a b`` with the rules of ``torch.matmul`` for vectors and batches."""
    names = [argument for argument in call.node.arguments if argument in _FACTORS]
    a, b = (call.tensor(name) for name in names[-2:])
    return product(call, a, b)


def product(call: Call, a: list[Axis], b: list[Axis]) -> list[Axis]:
    """Axes of a matrix product.

    Args:
        call: The operator call.
        a: Axes ``[..., n, k]`` or ``[k]``.
        b: Axes ``[..., k, m]`` or ``[k]``.

    Returns:
        Axes of the product.
    """
    call.unify(a[-1], b[-2] if len(b) > 1 else b[0])
    batch = call.broadcast(a[:-2], b[:-2]) if len(a) > 2 or len(b) > 2 else []
    return [*batch, *a[-2:-1], *(b[-1:] if len(b) > 1 else [])]


def added_product(call: Call) -> list[Axis]:
    """``c + a b``."""
    return call.broadcast(matmul(call), call.tensor())


def outer(call: Call) -> list[Axis]:
    """``a b^T`` of two vectors."""
    return [*call.tensor("self"), *call.tensor("vec2")]


def bilinear(call: Call) -> list[Axis]:
    """``y_o = x1^T W_o x2 + b_o``."""
    one, two, weight = (call.tensor(name) for name in ("input1", "input2", "weight"))
    call.unify(one[-1], weight[1])
    call.unify(two[-1], weight[2])
    if call.optional("bias"):
        call.unify(call.tensor("bias")[0], weight[0])
    return [*call.broadcast(one[:-1], two[:-1]), weight[0]]


def einsum(call: Call) -> list[Axis]:
    """Axes of one letter are tied; letters that do not come out are summed over."""
    left, _, right = call["equation"].replace(" ", "").partition("->")
    tensors = call.tensors()
    found: dict[str, Axis] = {}
    width = 0
    for term, axes in zip(left.split(","), tensors, strict=True):
        letters, dots = _letters(term, len(axes))
        width = max(width, dots)
        for letter, axis in zip(letters, axes, strict=True):
            if call.axes.size(found.setdefault(letter, axis)) == 1:
                found[letter] = axis
            call.unify(found[letter], axis)
    if "->" not in call["equation"]:
        letters = left.replace(",", "").replace(".", "")
        right = "..." * (width > 0) + "".join(
            c for c in sorted(set(letters)) if letters.count(c) < 2
        )
    return [found[letter] for letter in _letters(right, len(right.replace("...", "")) + width)[0]]


def attention(call: Call) -> list[Axis]:
    """``softmax(q k^T) v``: q and k share units, v gives its own; heads are a batch.

    With grouped queries every head of k and v serves a block of heads of q.

    Returns:
        Axes of the output.
    """
    q, k, v = (call.tensor(name) for name in ("query", "key", "value"))
    mask = call.optional("attn_mask")
    if call["enable_gqa"] and call.axes.size(q[-3]) != call.axes.size(k[-3]):
        served = call.axes.size(q[-3]) // call.axes.size(k[-3])
        k[-3] = (*k[-3], *call.fresh(served))
        v[-3] = (*v[-3], *call.fresh(served))
    call.unify(q[-1], k[-1])
    call.unify(k[-2], v[-2])
    batch = call.broadcast(q[:-2], k[:-2], v[:-2])
    if call["is_causal"]:
        call.fix(q[-2], k[-2])
    if mask is not None:
        call.broadcast([*batch, q[-2], k[-2]], list(mask))
    call.implied.append([*batch, q[-2], k[-2]])
    return [*batch, q[-2], v[-1]]


def _letters(term: str, count: int) -> tuple[list[str], int]:
    """Letters of a term, ``...`` as numbers counted from its end; and how many these are."""
    before, dots, behind = term.partition("...")
    width = count - len(before) - len(behind) if dots else 0
    return [*before, *(str(width - i) for i in range(width)), *behind], width


_FACTORS = ("self", "mat", "mat1", "mat2", "other", "batch1", "batch2", "vec", "tensor")

PRODUCT_RULES = {
    "linear.default": linear,
    **dict.fromkeys(("matmul.default", "mm.default", "bmm.default", "mv.default"), matmul),
    "dot.default": matmul,
    **dict.fromkeys(("addmm.default", "baddbmm.default", "addmv.default"), added_product),
    **dict.fromkeys(("outer.default", "ger.default"), outer),
    "bilinear.default": bilinear,
    "einsum.default": einsum,
    "scaled_dot_product_attention.default": attention,
}
