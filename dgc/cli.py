"""The `dgc` command: one subcommand a task, each a function from parsed options to nothing."""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dgc.errors import ConfigError, DGCError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 1 with a line on standard error for a fault of the input."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (DGCError, OSError) as error:
        print(f"dgc {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dgc", description="Compressed gradients and models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_bench, _add_compress, _add_inspect, _add_export):
        add(commands)
    return parser


def _add_bench(commands: Any) -> None:
    command = commands.add_parser(
        "bench", help="time dense, 16-bit and compressed exchange on this job's ranks"
    )
    command.add_argument(
        "model", help="safetensors file, MODULE:FUNCTION returning an nn.Module, or element count"
    )
    command.add_argument("--density", type=float, default=0.001, help="share sent [0.001]")
    command.add_argument("--value-bits", type=int, default=4, help="bits of a sent value [4]")
    command.add_argument("--bucket-mib", type=float, default=25.0, help="MiB a bucket [25]")
    command.add_argument("--repeats", type=int, default=5, help="timed exchanges a bucket [5]")
    command.add_argument("--backend", default="auto", help="as in dgc.init [auto]")
    command.set_defaults(run=_bench)


def _bench(options: argparse.Namespace) -> None:
    from dgc.bench import bench
    from dgc.comm.runtime import init
    from dgc.config import DGC

    if not 0 < options.bucket_mib < float("inf"):
        raise ConfigError(f"--bucket-mib is {options.bucket_mib}: give a number above 0")
    config = DGC(
        density=options.density,
        value_bits=options.value_bits,
        bucket_bytes=int(options.bucket_mib * 2**20),
    )
    sys.path.insert(0, "")  # MODULE:FUNCTION of the folder that the job was started in
    with init(options.backend) as runtime:
        try:
            table = bench(options.model, config, runtime.comm, runtime.device, options.repeats)
        except (DGCError, OSError) as error:
            print(f"dgc bench: {error}", file=sys.stderr)
            raise SystemExit(1) from None  # inside, so that under MPI the other ranks end too
        if runtime.rank == 0:
            print(table)


def _add_compress(commands: Any) -> None:
    command = commands.add_parser(
        "compress",
        help="prune, share and encode the weights in a safetensors file, without retraining",
    )
    command.add_argument("state", type=Path, help="safetensors file of weights")
    command.add_argument("out", type=Path, help="file to write")
    command.add_argument("--density", type=float, default=1.0, help="share of weights kept [1.0]")
    command.add_argument(
        "--scope", choices=["layer", "global"], default="layer", help="rank weights where [layer]"
    )
    command.add_argument("--bits", type=int, default=5, help="bits of shared values, 1 to 8 [5]")
    command.add_argument(
        "--penalty", type=float, default=0.0, help="relative squared error worth a coded bit [0]"
    )
    command.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="names of tensors left as they are, as of buffers: a file does not tell them from weights",
    )
    command.add_argument("--coder", choices=["ans", "huffman"], default="ans", help="[ans]")
    command.add_argument("--half", action="store_true", help="biases and codebooks in 16 bits")
    command.set_defaults(run=_compress)


def _compress(options: argparse.Namespace) -> None:
    from dgc import model as compression
    from dgc.model.bag import module_of, without_constraints
    from dgc.model.container import check_target
    from dgc.model.file import checked

    check_target(options.out)
    state = checked(without_constraints(_read_safetensors(options.state)))
    model = module_of(state, options.exclude)
    if options.density != 1:
        compression.prune(model, options.density, scope=options.scope)
    compression.share(model, options.bits, penalty=options.penalty, progress=_bars())
    print(compression.save(model, options.out, coder=options.coder, half=options.half))


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is no regular file: give a safetensors file")
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise ConfigError(f"{path} is not a safetensors file: {error}") from error


def _bars() -> bool:
    """Bars only for people, and only where they cost nothing to have."""
    return sys.stderr.isatty() and find_spec("tqdm") is not None


def _add_inspect(commands: Any) -> None:
    command = commands.add_parser("inspect", help="say what a compressed file consists of")
    command.add_argument("file", type=Path)
    command.add_argument("--picture", type=Path, help="write a picture too (.png, .svg, .pdf)")
    command.set_defaults(run=_inspect)


def _inspect(options: argparse.Namespace) -> None:
    from dgc import model as compression

    report, layers = compression.inspect(options.file)
    print(report)
    if options.picture is not None:
        from dgc.model.picture import file_picture

        file_picture(report, layers, options.picture)


def _add_export(commands: Any) -> None:
    command = commands.add_parser("export", help="turn a compressed file into plain safetensors")
    command.add_argument("file", type=Path)
    command.add_argument("out", type=Path, help="safetensors file to write")
    command.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> None:
    from dgc import model as compression

    compression.export(options.file, options.out)


if __name__ == "__main__":
    sys.exit(main())
