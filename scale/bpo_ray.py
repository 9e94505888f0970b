#!/usr/bin/env python3
"""Rewrites a data set, JSON Lines or Parquet, on a Ray cluster: one bpo filter process per worker.

    python scale/bpo_ray.py IN.jsonl OUT.jsonl --workers 8 --cpus 16 -- -m bpo.bin --seed 1

The driver cuts the input into pieces. Ray Data hands them to workers, and again to others if a
worker dies. The driver writes the results in the order of the input. A piece is either complete or
absent: nothing is lost or written twice. From JSON Lines to JSON Lines the output is byte for byte
that of `bpo -i IN -o OUT` with the same options, since the seed of a record depends only on the
run's seed and the record's id or line number. All machines must have the program, the model and the
input under the same paths.
"""

import argparse
import contextlib
import itertools
import json
import logging
import math
import os
import secrets
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import ray

BOM = b"\xef\xbb\xbf"
# options that this program sets or replaces
OURS = ("-i", "--input", "-o", "--output", "--resume", "--shard", "--numbered")


class Failure(Exception):
    """An error that is reported in one line."""


# ------------------------------------------------------------------------------------------- pieces


def jsonl_pieces(path: str, n_lines: int, n_skip: int) -> list[dict]:
    """Pieces of n_lines lines, with the bytes where they begin and end.

    The first n_skip lines and blank lines at the file's end are left out.
    """
    pieces, at = [], 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            begin = at + (len(BOM) if number == 1 and line.startswith(BOM) else 0)
            at += len(line)
            if number <= n_skip:
                continue
            if not pieces or pieces[-1]["n"] == n_lines:
                pieces.append({"first": number, "n": 0, "begin": begin, "end": begin, "n_kept": 0})
            piece = pieces[-1]
            piece["n"] += 1
            if line[len(line) - (at - begin) :].strip(b" \t\r\n"):
                piece |= {"end": at, "n_kept": piece["n"]}
    while pieces and pieces[-1]["n_kept"] == 0:
        pieces.pop()
    for piece in pieces[:-1]:  # blank lines count, except at the end of the file
        piece["n_kept"] = piece["n"]
    for piece, following in itertools.pairwise(pieces):
        piece["end"] = following["begin"]
    return [
        {"first": p["first"], "n": p["n_kept"], "begin": p["begin"], "end": p["end"]}
        for p in pieces
    ]


def parquet_pieces(path: str, n_rows: int, n_skip: int) -> list[dict]:
    """Pieces of n_rows rows, each within one row group, without the file's first n_skip rows."""
    pieces, at, metadata = [], 0, pq.read_metadata(path)
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).num_rows
        begin = min(max(n_skip - at, 0), size)
        for row in range(begin, size, n_rows):
            pieces.append(
                {"first": at + row + 1, "n": min(n_rows, size - row), "begin": row, "end": group}
            )
        at += size
    return pieces


def is_parquet(path: str) -> bool:
    """Whether a file is Parquet, by its name."""
    return path.endswith((".parquet", ".pq"))


class Source:
    """The input, read piece by piece as the lines that bpo gets."""

    def __init__(self, path: str):
        self.path, self.group, self.table = path, None, None

    def rows(self, piece: dict) -> pa.Table:
        """A piece of a Parquet file; the row group stays in memory for the next piece."""
        if self.group != piece["end"]:
            self.table = pq.ParquetFile(self.path).read_row_group(piece["end"])
            self.group = piece["end"]
        return self.table.slice(piece["begin"], piece["n"])

    def lines(self, piece: dict) -> list[bytes]:
        """The lines of a piece: those of JSON Lines unchanged, rows of Parquet as JSON objects."""
        if is_parquet(self.path):
            return [
                json.dumps(plain(row), ensure_ascii=False, default=str).encode()
                for row in self.rows(piece).to_pylist()
            ]
        with open(self.path, "rb") as file:
            file.seek(piece["begin"])
            data = file.read(piece["end"] - piece["begin"])
        return data.removesuffix(b"\n").split(b"\n")


def plain(value):
    """A row with null in place of numbers that JSON cannot express: infinities and NaN."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ------------------------------------------------------------------------------------------ workers


class Filter:
    """A Ray Data worker, which passes pieces through one bpo process.

    If the process is killed, a new one gets the lines without an answer; if it fails, the run ends.
    """

    def __init__(self, command: list[str], path: str):
        self.command, self.source = command, Source(path)
        self.process, self.errors = None, None

    def start(self) -> None:
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors
        )

    def feed(self, process: subprocess.Popen, lines: list[bytes]) -> None:
        # if the process has ended, the reader of its answers notices, too
        with contextlib.suppress(BrokenPipeError, ValueError):
            for line in lines:
                process.stdin.write(line)
            process.stdin.flush()

    def answers(self, lines: list[bytes]) -> list[bytes]:
        """The answers to the lines, one for each."""
        found, attempts = [], 0
        while len(found) < len(lines):
            if self.process is None:
                self.start()
            feeder = threading.Thread(target=self.feed, args=(self.process, lines[len(found) :]))
            feeder.start()
            n_before = len(found)
            while len(found) < len(lines):
                line = self.process.stdout.readline()
                if not line.endswith(b"\n"):
                    break
                found.append(line.removesuffix(b"\n"))
            if len(found) < len(lines):
                self.process.stdout.close()
                code = self.process.wait()
                self.errors.seek(0)
                message = self.errors.read()[-2000:].decode("utf-8", "replace").strip()
                self.process, attempts = None, attempts + 1 if len(found) == n_before else 0
                # below 0: killed by a signal, for example because memory ran out
                if code >= 0 or attempts == 3:
                    raise Failure(
                        f"{self.command[0]} ended with code {code}: {message or 'no error message'}"
                    )
            feeder.join()
        return found

    def __call__(self, batch: pa.Table) -> pa.Table:
        (piece,) = batch.to_pylist()
        lines = self.source.lines(piece)
        numbered = [b"%d\t%s\n" % pair for pair in enumerate(lines, piece["first"])]
        answers = pa.array([self.answers(numbered)], pa.list_(pa.large_binary()))
        return pa.table({"first": [piece["first"]], "answers": answers})


# ------------------------------------------------------------------------------------------- output


def is_error(record: dict) -> bool:
    """Whether a record reports that bpo could not rewrite the line."""
    return "input" in record["bpo"]


class JsonlOutput:
    """Appends the answers, unchanged, to a JSON Lines file."""

    def __init__(self, path: str, resume: bool):
        self.file = open(path, "r+b" if resume else "xb")  # noqa: SIM115
        self.file.seek(0, os.SEEK_END)

    def write(self, piece: dict, answers: list[bytes]) -> None:
        self.file.write(b"".join(answer + b"\n" for answer in answers))
        self.file.flush()

    def close(self) -> None:
        os.fsync(self.file.fileno())
        self.file.close()


class ParquetOutput:
    """Writes Parquet: the columns of the input, and three more.

    The columns of JSON Lines, whose members may differ from line to line, are those of FROM_JSONL.
    A Parquet file without its end is unreadable, so it has another name until then.
    """

    FROM_JSONL = pa.schema(
        {"line": pa.int64(), "id": pa.string(), "prompt": pa.string(), "record": pa.string()}
    )

    def __init__(self, path: str, source: str, field: str, output_field: str):
        if Path(path).exists():
            raise FileExistsError(path)
        self.path, self.field, self.output_field = path, field, output_field
        self.source = Source(source) if is_parquet(source) else None
        self.schema, self.writer = pq.read_schema(source) if self.source else self.FROM_JSONL, None

    def write(self, piece: dict, answers: list[bytes]) -> None:
        records = [json.loads(answer) for answer in answers]
        if self.source:
            table = self.source.rows(piece)
        else:
            ids = [
                json.dumps(i) if (i := r.get("id")) is not None and not isinstance(i, str) else i
                for r in records
            ]
            prompts = [None if is_error(r) else r[self.field] for r in records]
            numbers = range(piece["first"], piece["first"] + piece["n"])
            columns = [numbers, ids, prompts, [a.decode() for a in answers]]
            table = pa.table(dict(zip(self.schema.names, columns, strict=True)), schema=self.schema)
        texts = [r.get(self.output_field) for r in records]
        many = any(isinstance(text, list) for text in texts)
        kind = pa.list_(pa.string()) if many else pa.string()
        if self.writer:
            kind = self.writer.schema.field(self.output_field).type
        errors = [r["error"] if is_error(r) else None for r in records]
        table = table.append_column(self.output_field, pa.array(texts, kind))
        table = table.append_column("bpo", pa.array([json.dumps(r["bpo"]) for r in records]))
        table = table.append_column("error", pa.array(errors, pa.string()))
        self.writer = self.writer or pq.ParquetWriter(self.path + ".partial", table.schema)
        self.writer.write_table(table)

    def close(self) -> None:
        if not self.writer:
            raise Failure("the input has no records, so a Parquet output would have no columns")
        self.writer.close()
        os.replace(self.path + ".partial", self.path)


# ------------------------------------------------------------------------------------------- driver


def option(arguments: list[str], name: str, default: str | None = None) -> str | None:
    """The value of one of bpo's options, among its arguments."""
    for i, argument in enumerate(arguments):
        if argument.startswith(name + "="):
            return argument.removeprefix(name + "=")
        if argument == name and i + 1 < len(arguments):
            return arguments[i + 1]
    return default


def written_already(path: str) -> tuple[int, dict]:
    """The number of complete records in an output, and the "bpo" member of the first.

    An incomplete record at the end is cut off.
    """
    n, end, first = 0, 0, {}
    with open(path, "r+b") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            if n == 0:
                first = json.loads(line)["bpo"]
            n, end = n + 1, end + len(line)
        file.truncate(end)
    return n, first


def results(
    pieces: list[dict], command: list[str], path: str, workers: int, cpus: float
) -> Iterator[list[bytes]]:
    """The answers to each piece, in order."""
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    # one piece per task: a dead worker costs one piece
    data = ray.data.from_items(pieces, override_num_blocks=len(pieces))
    data = data.map_batches(
        Filter,
        fn_constructor_kwargs={"command": command, "path": path},
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(pieces))),
        num_cpus=cpus,
    )
    expected = iter(pieces)
    for batch in data.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in batch.to_pylist():
            piece = next(expected)
            if row["first"] != piece["first"] or len(row["answers"]) != piece["n"]:
                raise Failure(
                    f"expected {piece['n']} answers from line {piece['first']} on, "
                    f"found {len(row['answers'])} from line {row['first']} on"
                )
            yield row["answers"]
    if next(expected, None) is not None:
        raise Failure("some pieces have no answers")


def rewrite(options: argparse.Namespace, arguments: list[str]) -> int:
    """Rewrites the data set; returns the exit code."""
    n_done, first = 0, {}
    if options.resume and Path(options.output).exists():
        if is_parquet(options.output):
            raise Failure(
                "--resume needs a JSON Lines output: an incomplete Parquet file cannot be continued"
            )
        n_done, first = written_already(options.output)
    if option(arguments, "--seed") is None:
        seed = first.get("run_seed", secrets.randbelow(2**53))
        print(f"bpo_ray: seed {seed}", file=sys.stderr)
        arguments = [*arguments, "--seed", str(seed)]
    command = [options.bpo, *arguments, "-q", "-i", "-", "-o", "-", "--numbered", "--allow-errors"]
    make_pieces = parquet_pieces if is_parquet(options.input) else jsonl_pieces
    pieces = make_pieces(options.input, options.piece, n_done)
    if is_parquet(options.output):
        names = (
            option(arguments, "--field", "prompt"),
            option(arguments, "--output-field", "optimized_prompt"),
        )
        output = ParquetOutput(options.output, options.input, *names)
    else:
        output = JsonlOutput(
            options.output, n_done > 0 or (options.resume and Path(options.output).exists())
        )
    n_failed = 0
    if pieces:
        here = {
            "include_dashboard": False,
            "num_cpus": max(os.cpu_count() or 1, math.ceil(options.workers * options.cpus)),
        }
        logging.getLogger("ray").setLevel(logging.ERROR)
        ray.init(
            address=options.address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **({} if options.address else here),
        )
        found = results(pieces, command, options.input, options.workers, options.cpus)
        for piece, answers in zip(pieces, found, strict=True):
            run = json.loads(answers[0])["bpo"]["run"]
            if run != first.setdefault("run", run):
                raise Failure(
                    f"{options.output} was written with another model or other options "
                    f"(run {first['run']}, not {run})"
                )
            output.write(piece, answers)
            n_failed += sum(is_error(json.loads(answer)) for answer in answers)
            n_done += len(answers)
            if options.verbose:
                print(f"bpo_ray: {n_done} records", file=sys.stderr)
    output.close()
    print(f"bpo_ray: {n_done} records, {n_failed} failed in this run", file=sys.stderr)
    return 4 if n_failed and "--allow-errors" not in arguments else 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Options after -- are bpo's, -m among them."
    )
    parser.add_argument("input", help="JSON Lines, or Parquet if it ends in .parquet")
    parser.add_argument("output", help="likewise; must not exist yet, unless --resume is given")
    parser.add_argument(
        "--bpo", default="bpo", help="the program, by its name or path on the workers (bpo)"
    )
    parser.add_argument("--workers", type=int, default=2, help="the number of bpo processes (2)")
    parser.add_argument(
        "--cpus",
        type=float,
        default=1,
        help="cores that Ray reserves for each; give bpo's -t as well (1)",
    )
    parser.add_argument(
        "--piece",
        type=int,
        default=256,
        help="records per piece; a worker that dies loses at most one piece (256)",
    )
    parser.add_argument(
        "--address",
        help="the address of a running cluster, or auto (default: a cluster on this machine alone)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue where a JSON Lines output ends"
    )
    parser.add_argument("--verbose", action="store_true", help="report each piece that is written")
    arguments = sys.argv[1:]
    at = arguments.index("--") if "--" in arguments else len(arguments)
    options, rest = parser.parse_args(arguments[:at]), arguments[at + 1 :]
    taken = [argument for argument in rest if argument.split("=")[0] in OURS]
    if taken:
        parser.error(f"{taken[0]} is set by this program")
    if options.piece < 1 or options.workers < 1:
        parser.error("--piece and --workers must be at least 1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        return rewrite(options, rest)
    except FileExistsError:
        print(
            f"bpo_ray: {options.output} exists already: "
            "continue it with --resume (JSON Lines only), or name another",
            file=sys.stderr,
        )
        return 2
    except (OSError, Failure, pa.ArrowException, ray.exceptions.RayError) as error:
        # Ray surrounds a Failure's message with tracebacks
        lines = [line for line in str(error).splitlines() if "Failure: " in line]
        print(f"bpo_ray: {lines[-1].split('Failure: ')[-1] if lines else error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
