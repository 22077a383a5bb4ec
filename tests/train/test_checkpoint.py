"""States: refused when foreign, resized with their mass kept, free of pickled code."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dgc
from dgc.errors import ConfigError, StateError
from dgc.train import checkpoint
from tests.processes import run_processes
from tests.threads import ThreadCommunicator, run_ranks
from tests.train import checkpoint_checks as checks
from tests.workers import Toy, gradients, train, wrap

CONFIG = dgc.DGC(density=0.1, min_selected=1)


def trained(comm: ThreadCommunicator, steps: int = 4) -> tuple[Toy, dgc.DistributedOptimizer]:
    model = Toy()
    optimizer = wrap(model, CONFIG, comm)
    train(model, optimizer, range(steps))
    return model, optimizer


def states_of(world_size: int) -> list[dict[str, Any]]:
    return run_ranks(world_size, lambda comm: trained(comm)[1].state_dict())


@pytest.mark.parametrize("new_size", [1, 2, 3, 6])
def test_resize_keeps_the_mean_of_the_memories(new_size: int) -> None:
    old = states_of(4)
    new = [checkpoint.resize(old, rank, new_size) for rank in range(new_size)]
    for name, tensors in old[0]["memory"].items():
        for key in tensors:
            before = sum(s["memory"][name][key].double() for s in old) / 4
            after = sum(s["memory"][name][key].double() for s in new) / new_size
            torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("new_size", [1, 2, 8])
def test_resize_keeps_what_adam_will_move_by(new_size: int) -> None:
    """Steps are applied as the root of the number of ranks times their mean."""

    def body(comm: ThreadCommunicator) -> dict[str, Any]:
        model = Toy()
        adam = torch.optim.AdamW(model.parameters(), lr=0.01)
        config = dgc.DGC(density=0.1, min_selected=1)
        optimizer = dgc.DistributedOptimizer(adam, model.named_parameters(), config, comm)
        model.loss(gradients(0, comm.rank)).backward()
        optimizer.step()
        return optimizer.state_dict()

    old = run_ranks(4, body)
    new = [checkpoint.resize(old, rank, new_size) for rank in range(new_size)]
    for name, tensors in old[0]["memory"].items():
        before = sum(s["memory"][name]["v"].double() for s in old) / 4**0.5
        after = sum(s["memory"][name]["v"].double() for s in new) / new_size**0.5
        assert before.any() or tensors["v"].numel() < 2
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("new_size", [2, 6])
def test_training_goes_on_after_resize(new_size: int) -> None:
    old = states_of(4)

    def body(comm: ThreadCommunicator) -> list[torch.Tensor]:
        model, optimizer = trained(comm, 0)
        optimizer.load_state_dict(checkpoint.resize(old, comm.rank, comm.world_size))
        train(model, optimizer, range(4, 7))
        return [p.detach() for p in model.parameters()]

    one, *others = run_ranks(new_size, body)
    for other in others:
        assert all(map(torch.equal, one, other))


def test_resize_refuses_what_does_not_belong_together() -> None:
    old = states_of(2)
    with pytest.raises(StateError, match="the state of rank 1 of 2"):
        checkpoint.resize(old[:1], 0, 1)
    with pytest.raises(StateError, match="step 9, wanted is 4"):
        checkpoint.resize([old[0], {**old[1], "step": 9}], 0, 1)
    with pytest.raises(StateError, match="no state"):
        checkpoint.resize([], 0, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 0}, "version 0, here it is 3"),
        ({"rank": 3}, "rank 3, here it is 0: every rank saves its own"),
        ({"world_size": 4}, "world_size 4, here it is 1: .*resize"),
        ({"local_momentum": {"other": torch.zeros(1)}}, "momentum for other"),
        ({"local_momentum": {"a_bias": torch.zeros(1)}}, r"momentum of a_bias .*\(1,\), here \(7,"),
        ({"memory": {}}, "memory of a_bias in this state is {}"),
    ],
)
def test_a_foreign_state_is_refused(change: dict[str, Any], message: str) -> None:
    model = Toy()
    optimizer = wrap(model, CONFIG, None)
    train(model, optimizer, range(2))
    before = optimizer.state_dict()
    with pytest.raises(StateError, match=message):
        optimizer.load_state_dict({**before, **change})
    with pytest.raises(StateError, match="not a state of dgc"):
        optimizer.load_state_dict(optimizer.optimizer.state_dict())
    with pytest.raises(StateError, match="lacks memory"):
        optimizer.load_state_dict({k: v for k, v in before.items() if k != "memory"})
    for name, tensors in optimizer.state_dict()["memory"].items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, before["memory"][name][key])


def test_torch_save_needs_no_pickled_code(tmp_path: Path) -> None:
    model = Toy()
    optimizer = wrap(model, CONFIG, None)
    train(model, optimizer, range(2))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


def test_tensors_hold_the_whole_state() -> None:
    state = {"a": [1, 2.5, None, "x", True], 0: {"t": torch.arange(3)}}
    back = checkpoint.from_tensors(checkpoint.to_tensors(state))
    assert back["a"] == state["a"]
    assert torch.equal(back[0]["t"], torch.arange(3))
    with pytest.raises(ConfigError, match="state/f is a function"):
        checkpoint.to_tensors({"f": run_ranks})
    with pytest.raises(StateError, match="KeyError"):
        checkpoint.from_tensors({})


def test_a_folder_without_states_is_refused(tmp_path: Path) -> None:
    from torch.distributed.checkpoint import state_dict_saver

    with pytest.warns(UserWarning, match="single process"):
        state_dict_saver.save({"w": torch.ones(2)}, checkpoint_id=tmp_path, no_dist=True)
    model = nn.Linear(2, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(StateError, match="holds no state of dgc"):
        checkpoint.load(dgc.DistributedOptimizer(sgd, model.named_parameters(), CONFIG), tmp_path)


def test_a_world_of_one_saves_and_loads(tmp_path: Path) -> None:
    models = [Toy(), Toy()]
    optimizers = [wrap(model, CONFIG, None) for model in models]
    train(models[0], optimizers[0], range(3))
    checkpoint.save(optimizers[0], tmp_path)
    models[1].load_state_dict(models[0].state_dict())
    checkpoint.load(optimizers[1], tmp_path)
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(3, 6))
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


def test_another_checkpoint_is_not_written_over(tmp_path: Path) -> None:
    from torch.distributed.checkpoint import state_dict_saver

    with pytest.warns(UserWarning, match="single process"):
        state_dict_saver.save({"w": torch.ones(2)}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(ConfigError, match="another checkpoint"):
        checkpoint.save(wrap(Toy(), CONFIG, None), tmp_path)
    checkpoint.save(wrap(Toy(), CONFIG, None), tmp_path / "dgc")
    with pytest.warns(UserWarning, match="existing checkpoint"):  # torch's own
        checkpoint.save(wrap(Toy(), CONFIG, None), tmp_path / "dgc")


def test_a_save_that_was_interrupted_is_noticed(tmp_path: Path) -> None:
    from torch.distributed.checkpoint import state_dict_saver

    model = Toy()
    optimizer = wrap(model, CONFIG, None)
    keys = {}
    for rank in range(2):  # rank 1 is a step later
        train(model, optimizer, range(rank, rank + 1))
        state = {**optimizer.state_dict(), "rank": rank, "world_size": 2}
        keys |= {f"dgc/rank{rank}/{k}": t for k, t in checkpoint.to_tensors(state).items()}
    with pytest.warns(UserWarning, match="single process"):
        state_dict_saver.save(keys, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(StateError, match=r"ranks at steps \[1, 2\]"):
        checkpoint.load(optimizer, tmp_path)


def test_distributed_checkpoint_of_real_ranks(tmp_path: Path) -> None:
    saved, other = str(tmp_path / "saved"), str(tmp_path / "other")
    found = run_processes(
        4,
        {"saves": partial(checks.saves, saved), "wrapper": partial(checks.wrapper_resumes, other)},
    )
    assert found["wrapper"] == [None] * 4, found["wrapper"][0]
    assert isinstance(found["saves"][0], dict), found["saves"][0]
    check = partial(checks.resizes, saved, found["saves"][0])
    for ranks in (2, 6):
        resized = run_processes(ranks, {"resizes": check})["resizes"]
        assert resized == [None] * ranks, resized[0]
