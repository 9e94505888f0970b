"""The process of an engine: reads commands from standard input and answers each with a line.

worker.py KIND, with KIND as engines.KINDS names them. Commands are JSON lines, as bpo_worker.c
reads them. The first line says that the engine's packages are loaded.
"""

import json
import os
import sys

import engines


def main() -> None:
    """Serves commands until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)  # what libraries print must not come between
    os.dup2(2, 1)
    try:
        name, arguments = engines.KINDS[sys.argv[1]]
        engine = getattr(engines, name)(**arguments)
        print(json.dumps({"ready": True}), file=answers)
    except ImportError as e:
        error = f"the Python package {e.name} is not installed (make bench-deps)"
        print(json.dumps({"error": error}), file=answers)
        return
    for line in sys.stdin:
        command = json.loads(line)
        if "in" in command:
            command["in_"] = command.pop("in")
        try:
            answer = getattr(engine, command.pop("do"))(**command)
        except Exception as e:  # whatever it is, the harness tells it
            answer = {"error": f"{type(e).__name__}: {e}"}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
