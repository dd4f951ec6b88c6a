"""Build stand-ins for CANN's libraries, so that the unmodified torch_npu wheel can be imported and called.

    python tests/ascend/stand_in/build.py SITE_PACKAGES FOLDER [WITHOUT_BLOCK_SPARSE_ATTENTION]

SITE_PACKAGES is where torch and torch_npu are installed; the libraries go to FOLDER, for LD_LIBRARY_PATH. Which
libraries and functions are needed is read off the wheel's own libraries, whatever its version. Needs gcc and
binutils (nm, readelf).
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RUNTIME, OPERATORS = "libascendcl.so", "libopapi.so"
OPENED_LATER = (OPERATORS, "libnnopbase.so")  # by name, when the first operator is called
OF_CANN = re.compile(r"(acl[A-Za-z]|rt[A-Z]|Msprof)")
OF_THE_SYSTEM = re.compile(r"(ld-linux|lib(c|m|stdc\+\+|gcc_s|pthread|dl|rt|util)\.so)")
# Faster sums, but NaN and infinity as they are.
LOOPS = ("-O3", "-march=native", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math")


def build(site_packages: Path, folder: Path, *defines: str) -> None:
    """Compile all libraries into `folder`.

    Args:
        defines: macros for aclnn.c, such as ``WITHOUT_BLOCK_SPARSE_ATTENTION``.
    """
    folder.mkdir(parents=True)
    own = wheel_libraries(site_packages / "torch_npu")
    torch = sorted((site_packages / "torch" / "lib").glob("*.so*"))
    runtime = folder / "runtime.o"
    compile_to(runtime, HERE / "runtime.c", "-c", "-O1")
    refusals = folder / "refusals.c"
    there = symbols(*own, *torch, of=("-D", "--defined-only")) | symbols(runtime, of=("-g", "--defined-only"))
    refusals.write_text(refusing(symbols(*own, of=("-D", "--undefined-only")) - there))
    link(folder / RUNTIME, refusals, runtime)
    link(folder / OPERATORS, HERE / "aclnn.c", *LOOPS, *(f"-D{name}" for name in defines), "-lm")
    present = {path.name for path in (*own, *torch)}
    for name in sorted({*needed(own), *OPENED_LATER} - present - {RUNTIME, OPERATORS}):
        behind = OPERATORS if name in OPENED_LATER else RUNTIME
        nothing = folder / "nothing.c"
        nothing.write_text("")
        link(folder / name, nothing, "-Wl,--no-as-needed", str(folder / behind), "-Wl,-rpath,$ORIGIN")


def wheel_libraries(package: Path) -> list[Path]:
    """The wheel's libraries that call CANN."""
    return [*package.glob("_C*.so"), *(package / "lib").glob("*.so")]


def refusing(names: set[str]) -> str:
    """C source of functions that say they are not here, and end the process."""
    functions = [f'void {n}(void) {{ stand_in_refuses("{n}"); }}' for n in sorted(names) if OF_CANN.match(n)]
    return "\n".join(["void stand_in_refuses(const char *);", *functions, ""])


def needed(libraries: list[Path]) -> set[str]:
    """Names of the libraries that these load, without the system's."""
    printed = "".join(run("readelf", "-d", str(path)) for path in libraries)
    return {name for name in re.findall(r"NEEDED.*\[(.+?)\]", printed) if not OF_THE_SYSTEM.match(name)}


def symbols(*files: Path, of: tuple[str, ...]) -> set[str]:
    """Names that nm lists with these options, weak ones left out."""
    lines = [line.split() for path in files for line in run("nm", *of, str(path)).splitlines()]
    return {line[-1].partition("@")[0] for line in lines if len(line) > 1 and line[-2] != "w"}


def link(library: Path, *arguments: str | Path) -> None:
    """Compile and link a shared library that carries its own name."""
    compile_to(library, *arguments, "-shared", f"-Wl,-soname,{library.name}")


def compile_to(made: Path, *arguments: str | Path) -> None:
    """Run gcc."""
    run("gcc", "-Wall", "-Wextra", "-fPIC", "-o", str(made), *map(str, arguments))


def run(*command: str) -> str:
    """Run a tool; what it prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
