"""The LoRA layer's mathematics. ::

    forward   S  = D(X) A^T                 [M, r]
              Y  = X W^T + bias + s·S B^T   [M, N]
    backward  dS = s·dY B                   [M, r]
              dX = dY W + D'(dS A)          [M, K]
              dA = dS^T D(X)                [r, K]
              dB = s·dY^T S                 [N, r]
    DoRA      Y  = m / n ∘ X (W + s B A)^T + bias, n the norms of the rows of W + s B A
    gated MLP G = gate(X),  U = up(X),  Y = down(act(G) ∘ U)
    loss      L_i = log Σ_v exp(U_iv) - U_i,label_i,  U = c tanh(z Y / c), Y of a head
    experts   Y[t] = Σ_e w_te down_e(gate(up_e(X[t]))), e of the experts that token t chooses

gate, up and down are layers. act is SiLU, g σ(g); GELU, g Φ(g); or its approximation, g σ(2 √(2/π)
(g + 0.044715 g³)), usually written with tanh.

D is inverted dropout on the LoRA branch alone: D(X) = X ∘ keep / (1 - p), and D' multiplies by the
same keep / (1 - p).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def _dropout(x: Tensor, keep: Tensor | None, dropout_p: float) -> Tensor:
    return x if keep is None else x * keep.to(x.dtype) / (1.0 - dropout_p)


def lora_branch_ref(
    base_out: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """``base_out`` [..., N] with the branch of x [..., K], lora_A [r, K] and lora_B [N, r] added;
    keep [..., K] is D's mask.
    """
    s = _dropout(x, keep, dropout_p) @ lora_A.T
    return base_out + scaling * (s @ lora_B.T)


def lora_linear_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """``Y`` [..., N] of x [..., K], weight [N, K], bias [N], lora_A [r, K], lora_B [N, r]; keep
    [..., K] is D's mask.
    """
    y = x @ weight.T
    if bias is not None:
        y = y + bias
    return lora_branch_ref(y, x, lora_A, lora_B, scaling, keep, dropout_p)


def lora_linear_grads_ref(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> dict[str, Tensor]:
    """Gradients by name for an incoming grad [..., N]: dS [M, r], dX in x's shape, dA [r, K], dB
    [N, r].
    """
    grads = lora_branch_grads_ref(grad, x, lora_A, lora_B, scaling, keep, dropout_p)
    return grads | {"dX": grad @ weight + grads["dX"]}


def lora_branch_grads_ref(
    grad: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> dict[str, Tensor]:
    """As :func:`lora_linear_grads_ref`, but dX is the branch's alone; the gradient of base_out is
    ``grad`` itself.
    """
    dropped = _dropout(x, keep, dropout_p).reshape(-1, x.shape[-1])
    dy = grad.reshape(-1, grad.shape[-1])
    s = dropped @ lora_A.T
    ds = scaling * (dy @ lora_B)
    branch = (ds @ lora_A).reshape(x.shape)
    return {
        "dS": ds,
        "dX": _dropout(branch, keep, dropout_p),
        "dA": ds.T @ dropped,
        "dB": scaling * (dy.T @ s),
    }


def dora_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    magnitude: Tensor,
) -> Tensor:
    """``Y`` [..., N] of x [..., K], weight [N, K], bias [N], lora_A [r, K], lora_B [N, r] and
    magnitude [N].

    Autograd differentiates it, with the norms as constants.
    """
    merged = weight + scaling * lora_B @ lora_A
    y = magnitude / merged.detach().norm(dim=1) * (x @ merged.T)
    return y if bias is None else y + bias


def lora_linear_cross_entropy_ref(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """The loss of hidden [..., H], weight [V, H], bias [V], lora_A [r, H], lora_B [V, r] and labels
    [...]: -log softmax(U)[label] with U = softcap · tanh(logit_scale · Z / softcap).

    Autograd differentiates it.
    """
    if lora_A is None or lora_B is None:
        logits = hidden @ weight.T
        if bias is not None:
            logits = logits + bias
    else:
        logits = lora_linear_ref(hidden, weight, bias, lora_A, lora_B, scaling)
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    counts = labels != ignore_index
    index = torch.where(counts, labels, 0).unsqueeze(-1)
    losses = torch.logsumexp(logits, -1) - logits.gather(-1, index).squeeze(-1)
    losses = torch.where(counts, losses, 0.0)
    if reduction == "none":
        return losses
    total = losses.sum()
    return total / counts.sum() if reduction == "mean" else total


def lora_experts_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    offsets: Tensor,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """``Y`` [T, N] of x [T, K], weight [E, N, K], bias [E, N], lora_A [E, r, K], lora_B [E, N, r];
    keep [T, K] is D's mask.

    Expert e has the rows from ``offsets[e - 1]``, or 0, to before ``offsets[e]``; rows behind the
    last offset give zeros. Autograd differentiates it.
    """
    parts = []
    ends = [0, *offsets.tolist()]
    for e, rows in enumerate(map(slice, ends, ends[1:])):
        kept = None if keep is None else keep[rows]
        given = (x[rows], weight[e], None if bias is None else bias[e], lora_A[e], lora_B[e])
        parts.append(lora_linear_ref(*given, scaling, kept, dropout_p))
    return torch.cat([*parts, x.new_zeros(x.shape[0] - ends[-1], weight.shape[1])])


def lora_experts_mlp_ref(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate: Callable[[Tensor], Tensor],
    stacks: Sequence[Sequence[Any]],
    keeps: Sequence[Tensor | None] = (None, None),
    dropout_ps: Sequence[float] = (0.0, 0.0),
) -> Tensor:
    """The output [T, N] of a module of experts for x [T, H], the experts of each token ``index``
    [T, k] and their routing ``weights`` [T, k].

    ``stacks``: (weight, bias, lora_A, lora_B, scaling) of up and of down, as
    :func:`lora_experts_ref` takes them; ``gate`` maps up's output to down's input. ``keeps`` are
    D's masks for rows sorted by expert. An expert whose number is no place of the stacks adds
    nothing. Autograd differentiates it.
    """
    count = stacks[0][0].shape[0]
    expert_of_slot, order = torch.sort(index.reshape(-1), stable=True)
    places = torch.arange(count, device=index.device)
    offsets = (expert_of_slot[None] <= places[:, None]).sum(1)
    tokens = order // index.shape[1]
    h = x[tokens]
    for place, (weight, bias, lora_A, lora_B, scaling) in enumerate(stacks):
        branch = (lora_A, lora_B, scaling, offsets, keeps[place], dropout_ps[place])
        y = lora_experts_ref(h, weight, bias, *branch)
        h = gate(y) if place == 0 else y
    h = h * weights.reshape(-1)[order, None]
    return x.new_zeros(x.shape[0], h.shape[1]).index_add(0, tokens, h.to(x.dtype))


ACTIVATION_REFS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda g: g * torch.sigmoid(g),
    "gelu": lambda g: g * 0.5 * (1 + torch.erf(g / math.sqrt(2))),
    "gelu_tanh": lambda g: g * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)),
}


def activation_ref(g: Tensor, activation: str) -> Tensor:
    """act(g) for a name of :data:`ACTIVATION_REFS`. KeyError for another one."""
    return ACTIVATION_REFS[activation](g)


def lora_mlp_ref(
    x: Tensor,
    projections: Sequence[Sequence[Any]],
    scalings: Sequence[float],
    activation: str,
    keeps: Sequence[Tensor | None] = (None, None, None),
    dropout_p: float = 0.0,
) -> Tensor:
    """``Y`` [..., N] of x [..., K]. ``projections``: weight, bias, lora_A and lora_B of gate, up
    and down; keeps: D's masks.

    Autograd differentiates it.
    """
    gate, up, down = (
        [*p, s, keep, dropout_p] for p, s, keep in zip(projections, scalings, keeps, strict=True)
    )
    return lora_linear_ref(
        activation_ref(lora_linear_ref(x, *gate), activation) * lora_linear_ref(x, *up), *down
    )


def nf4_ref(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    shape: tuple[int, int],
    blocksize: int,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    offset: Tensor | None = None,
    nested_blocksize: int = 0,
) -> Tensor:
    """W [N, K] in float64 = ``code[index] · absmax``, from the tensors of
    :class:`stablelora_kernels.quantized.NF4Weight`.

    Count elements row after row. The index of element e is the upper half of byte e div 2 if e is
    even, else the lower half. Its absmax is that of block e div blocksize; if nested, that is
    ``nested_code[absmax] · nested_absmax + offset``.
    """
    element = torch.arange(shape[0] * shape[1])
    byte = packed.long()[element // 2]
    index = torch.where(element % 2 == 0, byte // 16, byte % 16)
    block = element // blocksize
    scale = absmax[block].double()
    if nested_absmax is not None and nested_code is not None and offset is not None:
        scale = (
            nested_code.double()[absmax[block].long()]
            * nested_absmax.double()[block // nested_blocksize]
            + offset.double()
        )
    return (code.double()[index] * scale).reshape(shape)


def fp8_ref(data: Tensor, scale: Tensor) -> Tensor:
    """W [N, K] in float64 from the bits of float8_e4m3fn data [N, K] and scale [N].

    A byte holds a sign, a 4-bit exponent e and a 3-bit fraction f. Its value is ``(1 + f/8) 2^(e -
    7)``, or ``f/8 · 2^-6`` if e is 0. With all of e and f set it is NaN.
    """
    bits = data.view(torch.uint8).long()
    exponent, fraction = (bits >> 3) & 15, (bits & 7).double() / 8
    value = torch.where(
        exponent == 0, fraction * 2.0**-6, (1 + fraction) * torch.exp2(exponent.double() - 7)
    )
    value = torch.where(bits & 127 == 127, torch.nan, value)
    return torch.where(bits >= 128, -value, value) * scale.double()[:, None]


def fp4_ref(
    packed: Tensor, scale: Tensor, tensor_scale: Tensor | None = None, swizzled: bool = False
) -> Tensor:
    """W [N, K] in float64 from the tensors of :class:`stablelora_kernels.quantized.FP4Weight`.

    Element k of a row is the lower half of byte k div 2 if k is even, else the upper half: a sign,
    a 2-bit exponent e and a fraction f of one bit, with the value ``(1 + f/2) 2^(e - 1)``, or
    ``f/2`` if e is 0. Its scale is that of block k div 16 in float8_e4m3fn, times tensor_scale; or,
    in uint8, of block k div 32: 2 to the power of the byte less 127, or NaN for 255.

    Swizzled, the scale of row n and block b is byte ``512 t + 16 (n mod 32) + 4 (n mod 128 div 32)
    + b mod 4``, where t is ``n div 128 · ceil(blocks / 4) + b div 4``.
    """
    n, k = packed.shape[0], 2 * packed.shape[1]
    element = torch.arange(k)
    byte = packed.long()[:, element // 2]
    bits = torch.where(element % 2 == 0, byte % 16, byte // 16)
    exponent, fraction = bits // 2 % 4, (bits % 2).double() / 2
    value = torch.where(exponent == 0, fraction, (1 + fraction) * torch.exp2(exponent.double() - 1))
    of_blocks, blocksize = scale, 16
    if scale.dtype == torch.uint8:
        powers = torch.exp2(scale.double() - 127)
        of_blocks, blocksize = powers.where(scale < 255, torch.nan), 32
    if swizzled:
        row, block = torch.arange(n)[:, None], torch.arange(k // blocksize)
        tile = row // 128 * -(-len(block) // 4) + block // 4
        place = 512 * tile + 16 * (row % 32) + 4 * (row % 128 // 32) + block % 4
        of_blocks = of_blocks.double().flatten()[place]
    whole = of_blocks.double() * (1.0 if tensor_scale is None else tensor_scale.double())
    return torch.where(bits < 8, value, -value) * whole[:, element // blocksize]


def philox_ref(seed: int, counter: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al., SC 2011): four 32-bit words, as int64 [..., 4], for each int64
    counter [...].

    The counter's low and high halves are the first two counter words; the other two are zero. The
    key is the seed's halves. Triton's ``tl.randint4x(seed, counter)`` gives the same words.
    """
    mask = 0xFFFFFFFF

    def mulhilo(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
        # Multiply by the two halves of the word: int64 would overflow on the whole product.
        low, high = constant * (word & 0xFFFF), constant * (word >> 16)
        middle = (low >> 16) + high
        return middle >> 16, ((middle << 16) | (low & 0xFFFF)) & mask

    c0, c1 = counter & mask, (counter >> 32) & mask
    c2 = c3 = torch.zeros_like(counter)
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        high_a, low_a = mulhilo(0xD2511F53, c0)
        high_b, low_b = mulhilo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return torch.stack((c0, c1, c2, c3), dim=-1)


def dropout_keep_ref(rows: int | Tensor, columns: int, dropout_p: float, seed: int) -> Tensor:
    """The Triton kernels' keep-mask, bool [rows, columns], bit for bit; or its rows of these
    numbers, int64 [rows].

    Element (i, j) takes word j mod 8 div 2 of the Philox counter i·ceil(columns / 8) + j div 8, its
    lower half if j is even, else its upper one. It is kept if the half's lower 15 bits are at least
    min(round(p·32768), 32767).
    """
    groups = -(-columns // 8)
    numbers = torch.arange(rows) if isinstance(rows, int) else rows
    counters = numbers[:, None] * groups + torch.arange(groups, device=numbers.device)
    words = philox_ref(seed, counters)
    halves = torch.stack((words, words >> 16), dim=-1).reshape(len(numbers), groups * 8)
    return (halves[:, :columns] & 0x7FFF) >= min(round(dropout_p * 32768), 32767)


def unpack_mask(mask: Tensor, columns: int) -> Tensor:
    """The keep-mask, bool [rows, columns], from what the kernels store: int32 [rows, ceil(columns /
    32)], lowest bits first.
    """
    bits = mask[:, :, None] >> torch.arange(32, device=mask.device) & 1
    return bits.reshape(len(mask), -1)[:, :columns] == 1
