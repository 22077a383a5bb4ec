"""On each rank: integer-valued training, compared bit for bit with a world made by hand.

Every figure is a small integer or a power of two, so no rounding can occur.
"""

import io
import sys
from pathlib import Path

import torch

import dgc
from dgc.config import PATTERNS
from tests.threads import run_ranks
from tests.workers import Toy, flat, gradients, train, wrap

OPTIONS = {"lr": 0.5, "momentum": 0.5}
CONFIGS = {
    "dgc": dgc.DGC(density=0.1, min_selected=1, value_bits=32, warmup_steps=4, bucket_bytes=100),
    "unmasked": dgc.DGC(density=0.1, min_selected=1, momentum_masking=False),
    "coded": dgc.DGC(density=0.1, min_selected=1, value_bits=4),
    "uncompressed": dgc.Dense(),
    **{name: dgc.DGC(density=0.1, value_bits=32, pattern=name) for name in PATTERNS[1:-1]},
}


def integers(step: int, rank: int) -> list[torch.Tensor]:
    return gradients(step, rank, integers=True)


with dgc.init(sys.argv[1]) as rt:
    for name, config in CONFIGS.items():
        model = Toy(seed=rt.rank, integers=True)
        optimizer = wrap(model, config, None, OPTIONS)
        train(model, optimizer, range(6), integers)
        everybody = rt.comm.all_gather(flat(model)).wait()
        assert all(torch.equal(each, everybody[0]) for each in everybody), f"{name}: ranks differ"

        def twin(comm: object, config: object = config) -> torch.Tensor:
            model = Toy(integers=True)
            train(model, wrap(model, config, comm, OPTIONS), range(6), integers)  # type: ignore[arg-type]
            return flat(model)

        wanted = run_ranks(rt.world_size, twin, per_host=rt.world_size)[0]
        assert torch.equal(flat(model), wanted), f"{name}: not what threads give"

        # Train 6, save, load, train 6 more: as 12 in one go.
        saved = io.BytesIO()
        torch.save({"model": model.state_dict(), "dgc": optimizer.state_dict()}, saved)
        saved.seek(0)
        state = torch.load(saved, weights_only=True)
        train(model, optimizer, range(6, 12), integers)
        again = Toy(seed=7)
        resumed = wrap(again, config, None, OPTIONS)
        again.load_state_dict(state["model"])
        resumed.load_state_dict(state["dgc"])
        train(again, resumed, range(6, 12), integers)
        assert torch.equal(flat(model), flat(again)), f"{name}: resuming differs"
    if rt.rank == 0:
        print("training agrees")

# A thread that outlives the communication may need the interpreter while it shuts down, and crash.
threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
assert "pt_gloo_runloop" not in threads, threads
