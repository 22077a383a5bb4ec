"""The laws that hold for every option: dense limit, oracle, conservation, agreement, determinism."""

import itertools

import pytest
import torch
from torch import Tensor

import dgc
from dgc.core.select import ChunkedTopK, ExactTopK, ThresholdTopK
from tests.oracle import Oracle, Sgd
from tests.threads import ThreadCommunicator, run_ranks
from tests.workers import Toy, flat, gradients, sgd_of, train, wrap

SGD_OPTIONS = [
    {"lr": 0.1, "momentum": 0.0},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.4},
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05},
    {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.05},
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05, "maximize": True},
]
SMALL = {"density": 0.1, "min_selected": 1}  # tensors here have few elements
VARIANTS = {
    "default": {},
    "lr inside": {"fold_lr": True},
    "no masking": {"momentum_masking": False},
    "least": {"min_selected": 3},
    "clipping": {"clip_norm": 3.0},
    "warm-up": {"warmup_steps": 6},
    "no correction": {"momentum_correction": False},
    "no accumulation": {"local_accumulation": False},
    "excluded": {"exclude": ("a_*",)},
    "small buckets": {"bucket_bytes": 32},
    "bfloat16 state": {"state_dtype": torch.bfloat16, "fold_lr": True},
    "paper": {"clip_norm": 3.0, "warmup_steps": 6},
}


def mean_gradients(step: int, workers: int) -> list[Tensor]:
    everybody = zip(*(gradients(step, rank) for rank in range(workers)), strict=True)
    return [torch.stack(each).mean(dim=0) for each in everybody]


@pytest.mark.parametrize("fold_lr", [True, False])
@pytest.mark.parametrize("exclude", [(), ("*",)])
@pytest.mark.parametrize("options", SGD_OPTIONS, ids=str)
def test_density_one_is_dense_sgd(
    options: dict[str, object], exclude: tuple[str, ...], fold_lr: bool
) -> None:
    second = {**options, "lr": 0.03, "momentum": 0.5 if options["momentum"] else 0.0}
    config = dgc.DGC(
        density=1.0, momentum_masking=False, value_bits=32, fold_lr=fold_lr, exclude=exclude
    )

    def body(comm: ThreadCommunicator) -> Tensor:
        model = Toy()
        optimizer = wrap(model, config, comm, options, second)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.97**step)
        for step in range(50):
            train(model, optimizer, range(step, step + 1))
            schedule.step()
        return flat(model)

    found = run_ranks(2, body)[0]
    model = Toy()
    sgd = sgd_of(model, options, second)
    schedule = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 0.97**step)
    for step in range(50):
        sgd.zero_grad()
        model.loss(mean_gradients(step, 2)).backward()
        sgd.step()
        schedule.step()
    assert (found - flat(model)).norm() <= 1e-6 * flat(model).norm()


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "excluded"])
def test_equals_the_oracle(variant: str, nesterov: bool, workers: int) -> None:
    config = dgc.DGC(**{**SMALL, "value_bits": 32, **VARIANTS[variant]})
    options = {"lr": 0.1, "momentum": 0.8, "nesterov": nesterov, "weight_decay": 0.01}
    steps = 15

    def body(comm: ThreadCommunicator) -> Tensor:
        model = Toy()
        train(model, wrap(model, config, comm, options), range(steps))
        return flat(model)

    found = run_ranks(workers, body)[0]
    model = Toy()
    names = [name for name, _ in model.named_parameters()]
    oracle = Oracle(
        {name: p.detach().double().view(-1).tolist() for name, p in model.named_parameters()},
        {name: Sgd(0.1, 0.8, nesterov, 0.0, 0.01) for name in names},
        config,
        workers,
    )
    for step in range(steps):
        oracle.step(
            [
                {
                    n: g.double().view(-1).tolist()
                    for n, g in zip(names, gradients(step, r), strict=True)
                }
                for r in range(workers)
            ]
        )
    wanted = torch.tensor([x for name in names for x in oracle.params[name]], dtype=torch.float64)
    tolerance = 2e-6 if config.state_dtype == torch.float32 else 0.05  # selects others
    assert (found - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 16, 32])
@pytest.mark.parametrize("selector", [ExactTopK(), ThresholdTopK(), ChunkedTopK(chunk=8)], ids=str)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_conservation(
    bits: int, selector: object, nesterov: bool, dtype: torch.dtype, tolerance: float
) -> None:
    """Without masking: Σ sent + residual = Σ what entered, on each rank, to rounding."""
    config = dgc.DGC(
        density=0.1,
        min_selected=1,
        value_bits=bits,
        selector=selector,  # type: ignore[arg-type]
        momentum_masking=False,
        fold_lr=False,
        state_dtype=dtype,
    )

    def body(comm: ThreadCommunicator) -> tuple[Tensor, Tensor]:
        model = Toy()
        optimizer = wrap(model, config, comm, {"momentum": 0.5, "nesterov": nesterov})
        u, entered = torch.zeros_like(flat(model)), torch.zeros_like(flat(model))
        sent = torch.zeros_like(flat(model))
        for step in range(20):
            g = torch.cat([each.view(-1) for each in gradients(step, comm.rank)])
            u = 0.5 * u + g
            entered += g + 0.5 * u if nesterov else u
            optimizer.zero_grad()
            model.loss(gradients(step, comm.rank)).backward()
            optimizer.synchronize()
            sent += torch.cat([p.grad.view(-1) for p in model.parameters() if p.grad is not None])
            optimizer.step()
        memory = optimizer.state_dict()["memory"]
        return entered, sent, torch.cat([memory[n]["v"] for n, _ in model.named_parameters()])

    results = run_ranks(2, body)
    entered = sum(each[0] for each in results) / 2
    kept = sum(each[2] for each in results) / 2
    error = (results[0][1] + kept - entered).abs().max()
    assert error <= tolerance * entered.abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_agree_and_runs_repeat(variant: str) -> None:
    config = dgc.DGC(**{**SMALL, **VARIANTS[variant]})

    def body(comm: ThreadCommunicator) -> Tensor:
        model = Toy(seed=comm.rank)  # rank 0's parameters win
        train(model, wrap(model, config, comm), range(100))
        return flat(model)

    first, again = run_ranks(3, body), run_ranks(3, body)
    for one, other in itertools.pairwise(first + again):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dense_is_the_mean(dtype: torch.dtype) -> None:
    def body(comm: ThreadCommunicator) -> Tensor:
        model = Toy(integers=True)
        optimizer = wrap(model, dgc.Dense(dtype=dtype), comm)
        model.loss(gradients(0, comm.rank, integers=True)).backward()
        optimizer.synchronize()
        return torch.cat([p.grad.view(-1) for p in model.parameters() if p.grad is not None])

    wanted = torch.stack(
        [torch.cat([g.view(-1) for g in gradients(0, rank, integers=True)]) for rank in range(4)]
    ).mean(dim=0)
    for found in run_ranks(4, body):
        assert torch.equal(found, wanted)
