"""Evaluate a saved model that thinks, in a process of its own: `python thinks_again.py FOLDER SETTINGS_JSON`."""

import json
import sys
from pathlib import Path

from trainers.quietstar import quietstar


def main():
    folder = Path(sys.argv[1])
    trainer = quietstar(folder.parent / "again", str(folder), num_eval_thoughts=2, **json.loads(sys.argv[2]))
    print(json.dumps(trainer.evaluate()))


if __name__ == "__main__":
    main()
