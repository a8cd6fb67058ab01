"""Attention fused, forward mode and in traces, against its unfused form in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from torch.func import jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from costbp.config.load import overlaid
from costbp.cost.bench import Bench
from costbp.cost.weightless import META, weightless
from costbp.estimators import attention
from costbp.meter import Meter

BATCH, HEADS, QUERIES, KEYS, WIDTH = 2, 4, 13, 11, 8
LIVE = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1)]


def unfused(*args, **options):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **options)


ours = attention.with_tangents(F.scaled_dot_product_attention)


def tensors(key_heads=HEADS, dtype=torch.float64, width_of_values=WIDTH):
    """Queries, keys, values as a model has them: heads beside each other, not yet before places."""
    torch.manual_seed(0)
    q = torch.randn(BATCH, QUERIES, HEADS, WIDTH, dtype=dtype)
    k = torch.randn(BATCH, KEYS, key_heads, WIDTH, dtype=dtype)
    v = torch.randn(BATCH, KEYS, key_heads, width_of_values, dtype=dtype)
    return [x.transpose(1, 2) for x in (q, k, v)]


def masks():
    torch.manual_seed(1)
    some = torch.rand(BATCH, 1, QUERIES, KEYS) > 0.3
    some[0, 0, 3] = False  # a row without a place
    return {
        "none": {},
        "causal": {"is_causal": True},
        "pairs": {"attn_mask": some},
        "places": {"attn_mask": torch.rand(BATCH, 1, 1, KEYS) > 0.3},
        "additive": {"attn_mask": torch.randn(QUERIES, KEYS, dtype=torch.float64)},
        "of heads": {"attn_mask": torch.randn(BATCH, HEADS, QUERIES, KEYS, dtype=torch.float64)},
    }


def derivatives(run, primals, tangents, live):
    """Value and derivatives [K, ...] along the tangents [K, ...] of those arguments that are live."""
    chosen = [i for i, alive in enumerate(live) if alive]

    def of(*given):
        return run(*(given[chosen.index(i)] if i in chosen else x for i, x in enumerate(primals)))

    start, along = (tuple(x[i] for i in chosen) for x in (primals, tangents))
    with torch.no_grad():
        if len(along[0]) == 1:
            with fwad.dual_level():
                duals = [fwad.make_dual(x, t[0]) for x, t in zip(start, along, strict=True)]
                value, slope = fwad.unpack_dual(of(*duals))
            return value, slope[None]
        one = lambda *t: jvp(of, start, t)  # noqa: E731
        return vmap(one, out_dims=(None, 0), randomness="same")(*along)


@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("block", [2**26, 3000, 1], ids=["whole", "blocks", "rows"])
def test_tangents_are_those_of_unfused_attention(mask, key_heads, block, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", block)
    options = {**masks()[mask], "enable_gqa": key_heads != HEADS}
    for live in LIVE:
        for count, scale, wide in ((1, None, WIDTH), (4, 0.3, WIDTH + 3)):
            given = tensors(key_heads, width_of_values=wide)
            tangents = [torch.randn(count, *x.shape, dtype=x.dtype) for x in given]
            found, wanted = (
                derivatives(partial(run, **options, scale=scale), given, tangents, live)
                for run in (ours, lambda q, k, v, **o: unfused(q, k, v, **o))
            )
            for one, other in zip(found, wanted, strict=True):
                assert (one - other).abs().max() < 1e-12 * other.abs().max(), (live, count)


def test_dropout_draws_one_mask_for_value_and_tangents(monkeypatch):
    """Through the identity as values, what is kept is read off the result; it must be the same there
    and in all directions."""
    monkeypatch.setattr(attention, "BLOCK", 3000)
    q, k, _ = tensors()
    v = torch.eye(KEYS, dtype=q.dtype).expand(BATCH, HEADS, KEYS, KEYS)
    tangents = [torch.randn(4, *x.shape, dtype=x.dtype) for x in (q, k, v)]
    drop = partial(ours, dropout_p=0.4)
    for count in (1, 4):
        along = [t[:count] for t in tangents]
        value, slopes = derivatives(drop, (q, k, v), along, (1, 1, 0))
        plain, wanted = derivatives(unfused, (q, k, v), along, (1, 1, 0))
        kept = (value != 0).double() / 0.6
        assert 0.5 < float((value != 0).double().mean()) < 0.7
        assert torch.allclose(value, kept * plain, rtol=1e-12)
        assert torch.allclose(slopes, kept * wanted, rtol=1e-9, atol=1e-14)


def test_learned_masks_and_odd_shapes_run_unfused():
    q, k, v = tensors()
    bias = torch.randn(QUERIES, KEYS, dtype=q.dtype)
    run = lambda f: jvp(lambda b: f(q, k, v, b), (bias,), (torch.ones_like(bias).tril(),))  # noqa: E731
    flat = lambda f: jvp(lambda x: f(x, k[0], v[0]), (q[0],), (q[1],))  # noqa: E731
    for case in (run, flat):
        assert torch.equal(case(ours)[1], case(unfused)[1])


def test_half_precision_is_as_near_as_unfused():
    q, k, v = tensors()
    tangents = [torch.randn(2, *x.shape, dtype=x.dtype) for x in (q, k, v)]
    exact = derivatives(unfused, (q, k, v), tangents, (1, 1, 1))
    errors = []
    for run in (ours, unfused):
        half = [x.bfloat16() for x in (q, k, v)], [x.bfloat16() for x in tangents]
        found = derivatives(run, *half, (1, 1, 1))
        assert found[0].dtype == found[1].dtype == torch.bfloat16
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)])
    assert errors[0][0] < 1.5 * errors[1][0] and errors[0][1] < 1.5 * errors[1][1]


@pytest.mark.parametrize("live", LIVE)
@pytest.mark.parametrize("mask", ["none", "causal", "pairs"])
@pytest.mark.parametrize("count", [1, 3])
def test_flops_are_those_of_the_docstring_on_meta_too(live, mask, count, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", count * 2200)  # blocks of six rows, the last of one
    given = tensors(2, torch.float32)
    tangents = [torch.randn(count, *x.shape) for x in given]
    product = 2 * BATCH * HEADS * QUERIES * KEYS * WIDTH
    wanted = product * (2 + count * (sum(live) + bool(live[0] or live[1])))
    run = partial(ours, **masks()[mask], enable_gqa=True)
    found = []
    for device in ("cpu", META):
        moved = [[x.to(device) for x in part] for part in (given, tangents)]
        meter = Meter([x for part in moved for x in part])
        with weightless() if device == META else torch.no_grad(), meter:
            derivatives(run, *moved, live)
        assert meter.flops == wanted
        found.append(meter.peak)
    if mask != "causal":  # a trace computes a block that sees everything
        assert found[0] == pytest.approx(found[1], rel=0.02)


@pytest.mark.parametrize("mask", ["none", "causal", "pairs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trace_dispatches_to_fused_attention_and_counts_what_the_cpu_does(mask, dtype):
    given = [x.to(dtype) for x in tensors()]
    options = masks()[mask]
    counts = []
    for device in ("cpu", META):
        q, k, v = (x.detach().to(device).requires_grad_() for x in given)
        with weightless() if device == META else torch.enable_grad():
            for backward in (False, True):
                with Meter([q, k, v]) as meter:
                    result = F.scaled_dot_product_attention(q, k, v, **options)
                    if backward:
                        result.backward(torch.ones_like(result))
                counts.append(meter.flops)
                names = result.grad_fn.name().lower()
                assert (
                    "flash"
                    if device == "cpu" or (mask != "pairs" and dtype == torch.bfloat16)
                    else "efficient"
                ) in names
    product = 2 * BATCH * HEADS * QUERIES * KEYS * WIDTH
    assert counts == [2 * product, 7 * product] * 2


def test_a_trace_keeps_no_scores_and_no_wide_mask():
    length, heads = 8192, 32
    with weightless():
        q = torch.randn(1, heads, length, 128, dtype=torch.bfloat16, requires_grad=True)
        with Meter([q]) as meter:
            result = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        assert meter.live < q.nbytes + 5 * heads * length
        at = torch.arange(length)
        with Meter([q]) as meter:
            mask = (at[:, None] >= at)[None, None].expand(1, 1, -1, -1)
            result = F.scaled_dot_product_attention(q, q, q, mask)
        assert mask.device == META  # 64 MiB that nobody reads
        bias = 2 * length**2
        assert q.nbytes + bias <= meter.live < q.nbytes + 1.6 * bias
        assert (
            result.shape == q.shape
            and (torch.arange(9)[:, None] > torch.arange(9)).device.type == "cpu"
        )


def test_at_length_forward_mode_needs_an_inference_and_as_much_in_tangents(plan):
    """Of an 8 B Llama at 1 x 8192: with a third of slack for what tangent rules compute on the way."""
    changes = {"source.bits": None, "source.loss_chunk": 256, "train.dropout": 0.0}
    bench = Bench(overlaid(plan.catalog.models["llama_3_1_8b"], changes, "test"))
    names = ("zo_vanilla", "fmad_vanilla", "bp_vanilla")
    found = {name: bench.cost(name, plan.catalog.methods[name], 1, 8192) for name in names}
    inference = found["zo_vanilla"].peak_bytes
    scores = 2 * 32 * 8192**2  # of one layer
    assert found["fmad_vanilla"].peak_bytes < 1.3 * 2 * inference < scores
    head = 2 * 8192 * 4096 * 128256 / found["zo_vanilla"].forward_flops  # made again, by chunks
    attention = 2 * 4096 * 8192 * 8192 * 2 * 32 / found["zo_vanilla"].forward_flops
    assert found["fmad_vanilla"].forward_units == pytest.approx(2 + attention, rel=5e-3)
    assert found["bp_vanilla"].forward_units == pytest.approx(2 + 1.5 * attention + head, rel=5e-3)
