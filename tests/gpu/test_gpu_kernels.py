"""The kernels on CUDA: the case table, real sizes, and the small operations beside plain torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kernels
from kernels import FORMATS, device, reference
from kernels.configs import DecodeConfig, SamplingConfig, Tuning, WideConfig
from tests.kernel_cases import CASES, Case, leave_window, make_problem
from tests.sampling_cases import CASES as SAMPLING_CASES
from tests.sampling_cases import Case as SamplingCase
from tests.sampling_cases import make_problem as make_sampling_problem

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}
# Many pieces, and what is shared is read once whatever it costs.
EAGER = Tuning(
    DecodeConfig(tile=32, shortest=32),
    *[WideConfig(rows=64, tile=32, num_warps=4, num_stages=2, shortest=64)] * 2,
    share=True,
)
REAL = (
    Case("8B heads, decode", (1,) * 6, (3000, 17, 640, 1, 1500, 1024), heads=(32, 8, 128), block_size=16),
    Case("8B heads, chunk", (130, 1, 70), (2000, 333, 70), heads=(32, 8, 128), block_size=16),
    Case("one key head", (1, 1, 40, 1), (900, 16, 300, 700), heads=(8, 1, 128), block_size=32, shared_blocks=0),
    Case(
        "8B heads, shared", (1,) * 20, (1100,) * 10 + (1300,) * 10, heads=(32, 8, 128), block_size=16, shared_blocks=64
    ),
    Case("heads of 64, window", (1, 200, 1), (1500, 900, 90), heads=(14, 2, 64), block_size=16, window=256, sinks=4),
    Case("heads of 256", (1, 60), (400, 300), heads=(8, 4, 256), block_size=16),
)


def check(case: Case, dtype: torch.dtype, **options: object) -> None:
    problem = make_problem(case, dtype, "cuda")
    leave_window(problem)
    result = problem.run(device, **options).cpu().double()
    torch.testing.assert_close(result, problem.expected(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


# Every other shape of heads and blocks is another build of each kernel, and a build takes seconds.
PLAIN = [case for case in CASES if case.heads == (4, 2, 16) and case.block_size == 8]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.bfloat16) for case in CASES] + [(case, t) for case in PLAIN for t in (torch.float16, torch.float32)],
    ids=str,
)
def test_attention(case: Case, dtype: torch.dtype) -> None:
    problem = make_problem(case, dtype, "cuda")
    result = problem.run().cpu().double()
    torch.testing.assert_close(result, problem.expected(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_attention_in_many_pieces(case: Case) -> None:
    check(case, torch.bfloat16, tuned=EAGER)


@pytest.mark.parametrize("case", REAL, ids=str)
def test_attention_of_real_size(case: Case) -> None:
    check(case, torch.bfloat16)


@pytest.mark.parametrize("case", [case for case in (*CASES, *REAL) if max(case.shared)], ids=str)
def test_sharing_changes_nothing(case: Case) -> None:
    check(
        case, torch.bfloat16, tuned=replace(EAGER, wide=WideConfig(), many=WideConfig(rows=128), decode=DecodeConfig())
    )
    check(case, torch.bfloat16, tuned=replace(EAGER, share=False))


def check_kept(case: Case, name: str, **options: object) -> None:
    problem = make_problem(case, torch.bfloat16, "cuda", FORMATS[name])
    leave_window(problem)
    result = problem.run(device, **options).cpu().double()
    tolerance = TOLERANCE[torch.bfloat16]
    torch.testing.assert_close(result, problem.expected(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", ["float16", "int8", "fp8", "int4"])
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_attention_over_what_was_kept(case: Case, name: str) -> None:
    check_kept(case, name)
    check_kept(case, name, tuned=EAGER)


@pytest.mark.parametrize("name", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("case", REAL, ids=str)
def test_attention_of_real_size_over_what_was_kept(case: Case, name: str) -> None:
    check_kept(case, name)


@pytest.mark.parametrize("name", ["int8", "fp8", "int4"])
def test_vectors_are_kept_as_the_twin_keeps_them(name: str) -> None:
    case = Case("kept", (40, 5), (60, 20), heads=(32, 8, 128), block_size=16)
    kept = []
    for operations in (device, reference):
        problem = make_problem(case, torch.bfloat16, "cuda", FORMATS[name])
        problem.key_value *= torch.logspace(-9, 7, 45, device="cuda")[:, None, None].bfloat16()
        problem.key_value[3, 2] = 0
        lens = (case.query_lens, case.context_lens)
        plan = operations.plan_attention(problem.kv_cache, *lens, problem.block_tables, num_heads=32)
        operations.write_kv(problem.key_value, problem.kv_cache.layer(problem.layer), plan)
        kept.append(problem.kv_cache.rows)
    assert torch.equal(*kept)


def test_a_plan_is_used_again_by_every_layer() -> None:
    case = Case("many pieces", (1,) * 4, (700, 500, 30, 900), heads=(8, 2, 64))
    problem = make_problem(case, torch.bfloat16, "cuda")
    first = problem.run(device, tuned=EAGER)
    layer_kv, lens = problem.kv_cache[:, problem.layer], case.query_lens
    plan = device.plan_attention(
        problem.kv_cache, lens, case.context_lens, problem.block_tables, num_heads=8, tuned=EAGER
    )
    for _ in range(50):
        again = device.attention(problem.query, layer_kv, plan, scale=64**-0.5)
        assert torch.equal(again, first)
    assert not plan.counters.any()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_small_operations(dtype: torch.dtype) -> None:
    def near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])

    torch.manual_seed(3)
    x, residual = (torch.randn(37, 4096, device="cuda").to(dtype) for _ in range(2))
    weight = torch.randn(4096, device="cuda").to(dtype)
    near(kernels.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    ours, theirs = (ops.add_rms_norm(x, residual.clone(), weight, 1e-5) for ops in (device, reference))
    near(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    near(kernels.silu_mul(x), reference.silu_mul(x))
    heads = torch.randn(37, 48, 128, device="cuda").to(dtype)
    weights = torch.randn(40, 128, device="cuda").to(dtype)
    copies = heads.clone(), heads.clone()
    device.head_rms_norm_(copies[0][:, :40], weights, 1e-5)
    reference.head_rms_norm_(copies[1][:, :40], weights, 1e-5)
    near(*copies)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_rotated_keys_are_written(dtype: torch.dtype) -> None:
    case = Case("written", (1, 5, 1), (10, 20, 64), heads=(32, 8, 128))
    angle = torch.randn(7, 1, 1, 64, device="cuda")
    sign = torch.tensor([-1.0, 1.0], device="cuda").view(1, 1, 2, 1)
    cos, sin = angle.cos().expand(-1, -1, 2, -1).to(dtype), (angle.sin() * sign).to(dtype)
    found = []
    for operations in (device, reference):
        problem = make_problem(case, dtype, "cuda")
        torch.manual_seed(4)
        heads = torch.randn(7, 48, 128, device="cuda").to(dtype)
        arguments = (problem.kv_cache, case.query_lens, case.context_lens, problem.block_tables)
        plan = operations.plan_attention(*arguments, num_heads=32)
        operations.rotary_write_kv(heads, cos, sin, problem.kv_cache[:, problem.layer], plan)
        found.append((heads[:, :32], problem.kv_cache))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], equal_nan=True)


@pytest.mark.parametrize("case", SAMPLING_CASES, ids=str)
def test_draws_are_those_of_the_table(case: SamplingCase) -> None:
    problem = make_sampling_problem(case)
    logits = problem.logits.cuda()
    for config in (SamplingConfig(), SamplingConfig(tile=128, room=64, guide=20, step=64)):
        assert device.sample(logits.clone(), problem.draws("cuda"), config).tolist() == problem.expected()


@pytest.mark.parametrize("vocab", [8192, 32_001, 151_936])
def test_draws_are_those_of_the_cpu(vocab: int) -> None:
    for spread in (0.3, 3.0, 8.0):
        problem = make_sampling_problem(SamplingCase("real", vocab, spread=spread, count=4))
        expected = reference.sample(problem.logits.clone(), problem.draws())
        assert torch.equal(device.sample(problem.logits.cuda(), problem.draws("cuda")).cpu(), expected)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("case", REAL, ids=str)
def test_fixed_order(case: Case, dtype: torch.dtype) -> None:
    """Deterministic mode: right, and for the last tokens of each sequence to the last bit what they are alone."""
    check(case, dtype, deterministic=True)
    problem = make_problem(case, dtype, "cuda")
    together = problem.run(device, deterministic=True)
    end = 0
    for index, count in enumerate(case.query_lens):
        end += count
        for last in {1, min(count, 33)}:
            rows = slice(end - last, end)
            alone = replace(
                problem,
                case=replace(case, query_lens=(last,), context_lens=case.context_lens[index : index + 1]),
                block_tables=problem.block_tables[index : index + 1],
                query=problem.query[rows],
                sink_query=problem.sink_query[rows],
                key_value=problem.key_value[rows],
            )
            assert torch.equal(alone.run(device, deterministic=True), together[rows])


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(4096, 6144), (1000, 333), (14336, 4096)])
def test_a_row_of_a_fixed_product(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(inputs)
    x, weight = (
        torch.randn(*shape, generator=generator).cuda().to(dtype) for shape in ((700, inputs), (outputs, inputs))
    )
    together = device.linear(x, weight, None)
    expected = (x.double() @ weight.double().T).float()
    error = (together.float() - expected).norm() / expected.norm()
    assert error < {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for rows in (slice(0, 1), slice(63, 65), slice(300, 316), slice(1, 700)):
        assert torch.equal(device.linear(x[rows], weight, None), together[rows])
