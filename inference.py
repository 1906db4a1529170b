"""Code pictures to `.dfo` files and decode them: DiffO's command line.

python inference.py -i photo.jpg -o out                              code, decode from the file, measure
python inference.py --mode compress -i pictures -o files             pictures -> .dfo
python inference.py --mode compress -i p.png -o files --target_bpp 0.08   the largest file not over a budget
python inference.py --mode decompress -i files -o out                .dfo -> .png
python inference.py --mode inspect -i files/photo.dfo                header and sizes of a file
"""

import sys

from coding import batch, options
from utils.commandline import answer


def main(argv: list[str] | None = None) -> int:
    return answer(batch.run, options.parse(argv, __doc__))


if __name__ == "__main__":
    sys.exit(main())
