"""The command `python -m release`: see release/from_run.py."""

import sys

from utils.commandline import answer, loading


def main(argv: list[str] | None = None) -> int:
    with loading():
        from release.from_run import parse, release
    return answer(release, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
