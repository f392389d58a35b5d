"""TEMPORARY: the interface of before, for the ops of before."""

from stablelora_kernels.launch import lora_linear as new
from stablelora_kernels.launch import lora_mlp as newm
from stablelora_kernels.projection import Projection


def forward_launches(device, x, weight, bias, a, b, s, y, seed, scaling, dropout_p, choice=None):
    if not x.shape[0]:
        return []
    return new.forward_launches(
        device, x, [Projection(weight, bias, a, b, scaling)], [seed], s, [y], dropout_p, None, choice
    )


def branch_forward_launches(device, base, x, a, b, s, y, seed, scaling, dropout_p):
    if not x.shape[0]:
        return []
    return new.forward_launches(
        device, x, [Projection(None, None, a, b, scaling)], [seed], s, [y], dropout_p, base.contiguous()
    )


def backward_launches(device, x, grad, weight, a, b, s, seed, dx, da, db, scaling, dropout_p, choice=None):
    if not grad.shape[0]:
        for t in (da, db):
            if t is not None:
                t.zero_()
        return []
    return new.backward_launches(
        device,
        x,
        [grad],
        [Projection(weight if dx is not None else None, None, a, b, scaling)],
        [s],
        [seed],
        dropout_p,
        (dx, [da], [db]),
        choice,
    )


def branch_backward_launches(device, x, grad, a, b, s, seed, dx, da, db, scaling, dropout_p):
    return backward_launches(device, x, grad, None, a, b, s, seed, dx, da, db, scaling, dropout_p)


def group_forward_launches(device, x, ws, biases, As, Bs, s, ys, seeds, scalings, dropout_p):
    if not x.shape[0]:
        return []
    ps = [Projection(*each) for each in zip(ws, biases, As, Bs, scalings)]
    return new.forward_launches(device, x, ps, seeds or [None] * len(ps), s, ys, dropout_p)


def group_backward_launches(device, x, grads, ws, As, Bs, s, seeds, scalings, dropout_p, dx, das, dbs):
    n = len(grads)
    if not grads[0].shape[0]:
        for t in (*das, *dbs):
            if t is not None:
                t.zero_()
        return []
    ps = [Projection(ws[i] if dx is not None else None, None, As[i], Bs[i], scalings[i]) for i in range(n)]
    return new.backward_launches(
        device,
        x,
        grads,
        ps,
        list(s) if dbs else [None] * n,
        seeds or [None] * n,
        dropout_p,
        (dx, das or [None] * n, dbs or [None] * n),
    )


def columns(s, ranks):
    return [*s.split([*ranks], 1)]


def mlp_forward_launches(device, x, ws, biases, As, Bs, seeds, scalings, dropout_p, activation, y, g, u, s, s_down):
    if not x.shape[0]:
        return []
    ps = [Projection(*each) for each in zip(ws, biases, As, Bs, scalings)]
    return newm.mlp_forward_launches(device, x, ps, seeds, dropout_p, activation, (y, g, u, s, s_down))


def mlp_backward_launches(
    device, x, grad, g, u, ws, As, Bs, s, s_down, seeds, scalings, dropout_p, activation, dx, das, dbs
):
    if not grad.shape[0]:
        for t in (*das, *dbs):
            if t is not None:
                t.zero_()
        return []
    ws = [w if w is not None and getattr(w, "data", w) is not None else None for w in ws]
    ps = [Projection(*each) for each in zip(ws, [None] * 3, As, Bs, scalings)]
    return newm.mlp_backward_launches(
        device, x, grad, (g, u, s, s_down), ps, seeds, dropout_p, activation, (dx, das, dbs)
    )
