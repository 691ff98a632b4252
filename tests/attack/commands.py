"""Hostile flags, values, streams, locales, settings files, prompts, data and saved results, for every command."""

import base64
import gzip
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from .campaign import Case
from .command import STREAMS, Command, interrupt_late, run
from .damage import DEEP, ODD_VALUES, spoil_bytes, spoil_file, spoil_json
from .flags import COMMANDS, FROZEN, FROZEN_ON_DATA, OF_BLOCKS, base_of, flags_of, hostile_value, takes_long
from .outcome import Miss, misses_of
from .victim import OUTPUTS, Victim

CASES = 2500
SHORT = (*range(0, 393, 24), *range(1000, 1010))  # some of the known cases, and some random ones


def attack(case: Case) -> Iterator[Miss]:
    """The first cases are known faults, one by one; the others are random."""
    if case.number < len(KNOWN):
        yield from _watched(case, KNOWN[case.number](case))
    elif case.number < len(KNOWN) + len(WORKING):
        yield from _watched(case, WORKING[case.number - len(KNOWN)](case), must_work=True)
    else:
        kinds = {
            _flags: 40, _prompts: 15, _data: 15, _harness: 6, _saved_results: 10, _settings_file: 8, _outputs: 8, _journal: 4,
            _interrupted: 4, _streams: 6,
        }  # fmt: skip
        yield from _watched(case, case.random.choices(list(kinds), list(kinds.values()))[0](case))


def _watched(case: Case, command: Command, must_work: bool = False) -> Iterator[Miss]:
    """Runs the command in a home whose files must survive."""
    case.say(command)
    victim = Victim(case)
    _fill(case, victim.home)
    if any(takes_long(argument) for argument in command.arguments):
        outcome, interrupted = interrupt_late(command, victim.home, case.logs)
    else:
        outcome, interrupted = run(command, victim.home, case.logs), False
    found = misses_of(outcome, interrupted=interrupted)
    yield from (miss for miss in found if command.stderr == "file" or miss.kind != "wrong")  # else it cannot report its error
    if must_work and outcome.status:
        yield Miss("wrong", f"this must work; {outcome.tail}")
    output, model = (_value_of(command, flag) for flag in ("--output", "--model"))
    beside = output == model and (command.arguments[0] == "calibrate" or "--frozen" in command.arguments)
    yield from victim.losses(victim.written_by_command(output, beside) if outcome.status == 0 and output else ())
    if (victim.home / "executed").exists():
        yield Miss("executed", "a marker was written")


def _fill(case: Case, home: Path) -> None:
    """Moves what an attack prepared to the folder where the command runs."""
    for file in list(case.folder.iterdir()):
        if file != home:
            shutil.move(file, home / file.name)


def _value_of(command: Command, flag: str) -> str:
    places = [place for place, argument in enumerate(command.arguments[:-1]) if argument == flag]
    return command.arguments[places[-1] + 1] if places else ""


# --- drawn --------------------------------------------------------------------------------------------------------------


def _flags(case: Case) -> Command:
    """One to three flags with values that are mostly invalid."""
    random = case.random
    name = random.choice(COMMANDS)
    arguments = list(base_of(name, case.material))
    if name in ("generate", "chat", "bench", "sweep-exits", "inspect", FROZEN) and random.random() < 0.4:
        arguments += ["--model", str(case.material.model(random.choice(("measured", "blocks"))))]
    flags = flags_of(name)
    if name == FROZEN and random.random() < 0.6:
        flags = tuple(flag for flag in flags if flag.name in OF_BLOCKS)
    for flag in random.choices(flags, k=random.choice((1, 1, 2, 3))):
        arguments += [flag.name, *([] if flag.is_switch else [hostile_value(flag, random)])]
    return Command(tuple(arguments), stdin=random.choice((b"", b"remind me", b"a\nb\n", None)))


def _prompts(case: Case) -> Command:
    random = case.random
    way = random.choice(("--lines", "--jsonl", "whole", "argument"))
    texts = [random.choice(_TEXTS) for _ in range(random.randrange(1, 5))]
    arguments = list(base_of("generate" if way != "argument" or random.random() < 0.7 else "inspect", case.material))
    arguments += random.choice(([], ["--raw"], ["--stop", random.choice(("a", " ", "\n", "\udcff", "\u20ac"))]))
    if arguments[0] == "inspect" and arguments[-1] != "--raw":
        del arguments[-2 * ("--stop" in arguments) :]
    if random.random() < 0.3:
        arguments += ["--model", str(case.material.model(random.choice(("chat", "measured", "blocks"))))]
    if way == "argument":
        text = texts[0].decode(errors="surrogateescape").replace("\0", "")
        return Command((*arguments, "--", text))
    if way != "whole":
        arguments += [way, "--batch-size", str(random.choice((1, 1, 2, 3)))]
    if way == "--jsonl" and random.random() < 0.7:
        lines = [json.dumps({"prompt": text.decode(errors="surrogateescape"), **_row_settings(random)}) for text in texts]
        return Command(tuple(arguments), "\n".join([*lines[:-1], spoil_json(lines[-1], random)[0]]).encode())
    return Command(tuple(arguments), b"\n".join(texts), encoding=random.choice(("utf-8", "ascii", "latin-1")))


def _row_settings(random: Random) -> dict[str, object]:
    """Settings of a row of JSON lines, most of them wrong."""
    keys = random.choices(_ROW_KEYS, k=random.choice((0, 1, 1, 2)))
    return {key: random.choice((*ODD_VALUES, *_POLICIES, 0.7, ["a", ""])) for key in keys}


_ROW_KEYS = ("policy", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop", "unknown", "strategy")
_POLICIES = ("exact", "fast", "confident", "copies", "absent")
_TEXTS = (
    *(b"remind me to call mom", b"", b" ", b"\n", b"\0", b"\xff\xfe", b"\xed\xa0\x80", "\u00e9\U0001f600".encode(), b"\r\n"),
    *(b"word " * 400, b"x" * 50_000, b"<s></s><pad>[IN:", b"{prompt}", b"{{ 7*7 }}", b"\x1b[2J\x1b]0;x\x07", b"[" * DEEP),
    *(b'{"prompt": 1}', b'{"prompt": "\\ud800"}', b"[]", b"null", b'{"prompt": NaN}', b"{" * 3000, b"\xef\xbb\xbfabc"),
    *("\u2028\u2029\u0085".encode(), "\u202eabc".encode(), b"a\tb\vc\fd", b"-", b"--model", b"%s%n", b"1" * 5000),
)


def _data(case: Case) -> Command:
    """A data set with a fault, given to any command that reads one."""
    random = case.random
    name = random.choice(
        (
            *("rows.jsonl", "rows.csv", "rows.parquet", "text.txt", "chat.jsonl", "code.jsonl", "mbpp.jsonl", "prompts.jsonl"),
            "topv2",
        )
    )
    target = case.folder / name
    if name == "topv2":
        shutil.copytree(case.material.data / name, target)
        file = random.choice(sorted(target.iterdir()))
    else:
        file = Path(shutil.copy(case.material.data / name, target))
    case.say(spoil_file(file, random) if random.random() < 0.8 else _replace(file, random.choice(_FILES)))
    if random.random() < 0.1 and name != "topv2":
        packed = gzip.compress(file.read_bytes())
        file.unlink()
        name += ".gz"
        (case.folder / name).write_bytes(spoil_bytes(packed, random) if random.random() < 0.7 else packed)
    task = {"code.jsonl": "humaneval", "mbpp.jsonl": "mbpp", "text.txt": "lm"}.get(name.removesuffix(".gz"), "jsonl")
    reader = random.choice(("data", "bench", "sweep-exits", "finetune", FROZEN, FROZEN_ON_DATA))
    arguments = [*base_of(reader, case.material), "--data", name]
    if reader in ("bench", "sweep-exits"):
        arguments += ["--task", random.choice((task, task, task, "jsonl", "cnn_dm", "xsum", "lm", "humaneval", "mbpp"))]
        arguments += random.choice(([], [], ["--shots", "2"], ["--template", "chat"], ["--template", "Q {prompt} A"]))
    if reader == "finetune":
        arguments += random.choice(([], ["--streaming", "--samples", "0"], ["--validation", name], ["--pack"]))
    if reader in (FROZEN, FROZEN_ON_DATA):
        arguments += random.choice(([], [], ["--validation", name], ["--prompt-column", "text"]))
    return Command(tuple(arguments))


def _harness(case: Case) -> Command:
    """Tasks of lm-evaluation-harness with a fault in their files."""
    random = case.random
    folder = Path(shutil.copytree(case.material.data / "harness", case.folder / "harness"))
    file = random.choice(sorted(folder.iterdir()))
    case.say(spoil_file(file, random) if random.random() < 0.6 else _replace(file, random.choice((*_FILES, *_TASK_FILES))))
    tasks = [file] if file.suffix == ".yaml" else sorted(folder.glob("*.yaml"))
    reader = random.choice(("bench", "sweep-exits"))
    arguments = [reader, "--model", str(case.material.model()), "--task", f"lm-eval:{random.choice(tasks).stem}"]
    arguments += [
        "--include-path",
        "harness",
        "--samples",
        "2",
        *(("--repeats", "1") if reader == "bench" else ("--exits", "2")),
    ]
    arguments += random.choice(
        ([], [], ["--shots", "1"], ["--template", "chat"], ["--batch-size", "2"], ["--output", "scores"])
    )
    return Command(tuple(arguments))


_TASK_FILES = (
    *(
        b"task: [",
        b"task: x\n",
        b"group: multiple_choice\ntask: [multiple_choice, x]\n",
        b"task: !function nothing.here\n",
        b"- 1",
    ),
    *(b"include: absent.yaml\n", b"include: multiple_choice.yaml\n", b"a: &a [*a]\n", b"task: 1\noutput_type: 2\n"),
)


def _replace(file: Path, content: bytes) -> str:
    file.write_bytes(content)
    return f"{file.name} = {content[:40]!r}... ({len(content)} bytes)"


_FILES = (
    *(b"", b"\n\n", b"\0" * 100, b"\xef\xbb\xbf", b"\xff\xfe{\0}\0", b"[" * DEEP, b'{"a":' * 5000, b"[]\n", b"null\n", b"1\n"),
    *(b'{"prompt": "a", "completion": "\\ud800"}\n', b'{"prompt": "\\udfff", "completion": "b"}\n', b"prompt,completion\n"),
    *(b'{"prompt": "a", "completion": 1}\n', b'{"prompt": ["a"], "completion": {"b": 1}}\n', b'{"completion": ""}\n'),
    *(
        b'{"messages": []}\n',
        b'{"messages": [{"role": 1}]}\n',
        b'{"messages": "x"}\n',
        b'{"messages": [{"role": "assistant"}]}\n',
    ),
    *(b'prompt,completion\n"a,b\n', b"p" * 200_000 + b",completion\na,b\n", b"prompt,completion\n" + b"x" * 200_000 + b",y\n"),
    *(b"prompt,completion\na\0b,c\n", b"prompt,prompt,completion\na,b,c\n", b"prompt\tcompletion\r\ra\tb\r", b"PAR1" * 100),
    *(b'{"text": 1, "test_list": "x", "code": []}\n', b'{"task_id": 1, "text": "t", "code": "c", "test_list": [1, null]}\n'),
    *(b'{"prompt": "p", "test": 5, "entry_point": "x"}\n', b'{"prompt": "p", "test": "t", "entry_point": "1 + 1; x"}\n'),
)


def _saved_results(case: Case) -> Command:
    """An edited results.json, rendered again or compared."""
    random = case.random
    kind = random.choice(("bench", "sweep-exits"))
    source = (case.material.bench if kind == "bench" else case.material.sweep) / "results.json"
    file = Path(shutil.copy(source, case.folder / "results.json"))
    case.say(spoil_file(file, random))
    arguments = [kind, "--from", "results.json", "--format", random.choice(("table", "json", "csv", "markdown"))]
    if random.random() < 0.2:
        arguments += ["--output", "rendered"]
    if kind == "sweep-exits" and random.random() < 0.2:
        arguments += ["--save"]
    if random.random() < 0.2:
        arguments = ["compare", "results.json", *arguments[3:5], *random.choice(([], ["--output", "compared"]))]
    return Command(tuple(arguments))


def _settings_file(case: Case) -> Command:
    """`finetune --config`."""
    random = case.random
    name = random.choice(("finetune", FROZEN))
    lines = []
    for flag in random.choices(flags_of("finetune"), k=random.randrange(1, 5)):
        value = random.choice((json.dumps(hostile_value(flag, random, legal=True)), *_TOML_VALUES))
        lines.append(f"{flag.name.removeprefix('--')} = {value}")
    text = random.choice(("\n".join(lines), "\n".join(lines), *_TOML_FILES))
    data = text.encode(errors="surrogatepass")
    (case.folder / "settings.toml").write_bytes(spoil_bytes(data, random) if random.random() < 0.2 else data)
    case.say(f"settings.toml: {data[:300]!r}")
    return Command((*base_of(name, case.material), "--dry-run", "--config", "settings.toml"))


_TOML_VALUES = (
    *("1", "-1", "0.5", "nan", "inf", "-inf", "true", '""', "[]", "[1, 2]", "{}", "{a = 1}", "1979-05-27", "07:32:00"),
    *("9223372036854775807", "99999999999999999999999", "1e400", '"x"', '"""\n"""', "[[1], [2]]", '"1:10000000000"'),
)
_TOML_FILES = (
    *(
        "",
        "=",
        "a",
        "[steps]\nx = 1",
        "steps = " + "[" * 5000,
        "steps = " + "{a=" * 3000,
        "\ufeffsteps = 1",
        "steps = 1\nsteps = 2",
    ),
    *('"" = 1', "config = 'settings.toml'", "help = true", "'dry-run' = false", 'steps = "\\uD800"', "a." * 3000 + "b = 1"),
    *("[[steps]]", "# \ud800", "dry_run = false", "no-pack = true", "pack = 'x'", "lines = true"),
)


def _outputs(case: Case) -> Command:
    """Outputs whose path is taken by something else."""
    random = case.random
    name = random.choice(("import", "import", "export", "finetune", FROZEN, "bench", "sweep-exits", "inspect"))
    output = random.choice(OUTPUTS)
    arguments = [*base_of(name, case.material), "--output", output]
    if name in ("import", "export", "finetune", FROZEN):
        arguments += random.choice(([], ["--overwrite"], ["--overwrite"]))
    if name == "export":
        arguments += random.choice(([], ["--format", "gguf"], ["--engine", "vllm"], ["--engine", "llama.cpp"]))
    if name == FROZEN:
        arguments += random.choice(([], ["--model", output], ["--save-steps", "1"], ["--resume"]))
    if name == "finetune":
        arguments += random.choice(([], ["--save-steps", "1"], ["--resume"], ["--lora-rank", "2", "--lora-keep"]))
    if name == "bench":
        arguments += random.choice(([], ["--resume"]))
    return Command(tuple(arguments))


def _journal(case: Case) -> Command:
    """Resumes from a damaged unfinished.jsonl."""
    (case.folder / "going").mkdir()
    file = Path(shutil.copy(case.material.journal, case.folder / "going" / "unfinished.jsonl"))
    case.say(spoil_file(file, case.random))
    return Command((*case.material.bench_flags(), "--output", "going", "--resume"))


def _interrupted(case: Case) -> Command:
    """Goes on with `finetune --frozen` from damaged answers, states and checkpoints."""
    random = case.random
    going = Path(shutil.copytree(case.material.frozen, case.folder / "going"))
    for kind in random.choices(
        ("answers-*.jsonl", "states-*/*", "checkpoint-*/*", "*"), (4, 3, 2, 1), k=random.choice((1, 1, 2))
    ):
        if paths := sorted((going / "checkpoints").glob(kind)):
            case.say(_spoil_kept(random.choice(paths), random))
    more = random.choice(((), ("--resume",), ("--resume",), ("--resume",), ("--overwrite",), ("--resume", "--dry-run")))
    return Command((*case.material.frozen_flags(), "--output", "going", *more))


def _spoil_kept(path: Path, random: Random) -> str:
    """Damages what an interrupted run keeps: a file's content, or what stands in its place."""
    way = random.random()
    if path.is_file() and way < 0.75:
        return spoil_file(path, random)
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if way < 0.85:
        return f"without {path.name}"
    if way < 0.9:
        path.mkdir()
        return f"{path.name} is an empty folder"
    if way < 0.95:
        path.write_bytes(random.choice((b"", b"\n", b"\xff" * 400)))
        return f"{path.name} is a file of {path.stat().st_size} bytes"
    path.symlink_to(random.choice(("absent", "/dev/null", "..")))
    return f"{path.name} is a link to {os.readlink(path)}"


def _streams(case: Case) -> Command:
    random = case.random
    name = random.choice(COMMANDS)
    return Command(
        base_of(name, case.material),
        random.choice((b"", b"remind me", None)),
        random.choice(STREAMS),
        random.choice(("file", *STREAMS)),
        random.choice(("utf-8", "ascii", "cp1252")),
        random.choice(({}, {"COLUMNS": "1"}, {"COLUMNS": "x"}, {"TERM": "dumb"}, {"HOME": "/nonexistent"}, {"RANK": "x"})),
    )


# --- known, one by one -----------------------------------------------------------------------------------------------------


def _known(*arguments: str, base: str = "generate", **keywords: object) -> Callable[[Case], Command]:
    """`base`: the command whose short form precedes the arguments. `{MODEL}` stands for a model of the material."""

    def make(case: Case) -> Command:
        found = [
            str(case.material.model(argument[1:-1])) if argument.startswith("{") and argument[1:-1] in _NAMED else argument
            for argument in arguments
        ]
        return Command((*base_of(base, case.material), *found), **keywords)

    return make


_NAMED = ("gemma3_text", "chat", "adapter", "tiny.gguf", "qwen2", "smollm3", "sharded", "measured", "blocks")
_COPIED = ("gemma3_text", "chat", "qwen2", "smollm3", "sharded", "measured", "blocks")  # by finetune --frozen


def _verified(model: str) -> Callable[[Case], Command]:
    """`verify` of a model of the material on all kernels that run it."""

    def make(case: Case) -> Command:
        few = ("--samples", "2", "--max-new-tokens", "3", "--draws", "0", "--specs", "2", "--precisions", "fp32,int8")
        return Command(("verify", str(case.material.model(model)), *few))

    return make


def _file(name: str, content: bytes, *arguments: str, base: str) -> Callable[[Case], Command]:
    def make(case: Case) -> Command:
        (case.folder / name).write_bytes(content)
        return Command((*base_of(base, case.material), *arguments))

    return make


def _going_on(*arguments: str, spoil: Callable[[Path], object] = lambda folder: None) -> Callable[[Case], Command]:
    """`finetune --frozen` after it was killed. `spoil` gets the folder of what it keeps."""

    def make(case: Case) -> Command:
        going = Path(shutil.copytree(case.material.frozen, case.folder / "going"))
        spoil(going / "checkpoints")
        return Command((*case.material.frozen_flags(), "--output", "going", *arguments))

    return make


def _answers(change: Callable[[str], str]) -> Callable[[Path], object]:
    """Changes the text of the journal of answers."""

    def spoil(folder: Path) -> None:
        (journal,) = folder.glob("answers-*.jsonl")
        journal.write_text(change(journal.read_text()))

    return spoil


def _states(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Changes the bytes of each file of states."""

    def spoil(folder: Path) -> None:
        for file in folder.glob("states-*/*.bf16"):
            file.write_bytes(change(file.read_bytes()))

    return spoil


def _without(kind: str) -> Callable[[Path], object]:
    """Removes files and folders."""

    def spoil(folder: Path) -> None:
        for path in folder.glob(kind):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def _mbpp(**changes: object) -> bytes:
    row = {"task_id": 1, "text": "t", "code": "c", "test_list": ["assert 1"], "test_setup_code": "", **changes}
    return json.dumps(row).encode() + b"\n"


_ROWS = (  # settings of rows of JSON lines
    *(b'"policy": "absent"', b'"policy": ""', b'"policy": 3', b'"policy": ["fast"]', b'"policy": "copies"'),
    *(b'"max_new_tokens": 0', b'"max_new_tokens": 1e400', b'"max_new_tokens": 2.5', b'"max_new_tokens": true'),
    *(b'"temperature": NaN', b'"temperature": -1', b'"temperature": 1e308', b'"temperature": 1e-320', b'"seed": -1'),
    *(b'"stop": ""', b'"stop": [3]', b'"stop": []', b'"stop": {}', b'"top_p": 0', b'"top_k": -1', b'"unknown": {"a": [1]}'),
    b'"prompt": "' + b"x" * 3000 + b'"',
)
KNOWN: tuple[Callable[[Case], Command], ...] = (
    _known("--template", "chat", base="bench"),
    _known("--template", "chat", base="sweep-exits"),
    *(_known("--seed", seed, base=base) for seed in ("-1", str(2**32), str(2**64), str(2**70)) for base in COMMANDS[:5]),
    *(_known("--exits", counts, base=base) for counts in ("1:10000000000", "1:2:0") for base in ("sweep-exits", "finetune")),
    _known("--specs", "1:10000000000", base="sweep-exits"),
    *(_known("--pass-k", counts, base=base) for counts in ("1:10000000000", "") for base in ("bench", "sweep-exits")),
    _known("--layers", "1:10000000000", base="inspect"),
    *(_known("--threads", count, base=base) for count in ("100000", str(2**31)) for base in ("generate", "bench", "inspect")),
    _known("--batch-size", str(2**70), "--lines", stdin=b"a\nb\n"),
    _known("--batch-size", str(2**70), base="bench"),
    *(_known("--epochs", epochs, "--dry-run", base="finetune") for epochs in ("inf", "nan", "1e308")),
    *(_known("--escale", scale, base="finetune") for scale in ("1e308", "inf", "nan")),
    *(_known("--lr", rate, base="finetune") for rate in ("inf", "nan", "1e308")),
    *(_known("--temperature", value) for value in ("1e-50", "1e-320", "nan", "inf", "1e308")),
    *(_known("--temperature", "1", "--top-p", value) for value in ("1e-50", "nan", "1e-320")),
    _known("--quantize", "int8", "--model", "{gemma3_text}"),
    *(_known(stdout="closed", base=base) for base in COMMANDS),
    *(_known(stderr="closed", base=base) for base in COMMANDS),
    *(_known(stdout="full", base=base) for base in COMMANDS),
    _known("--output", "null", base="inspect"),
    _known("--output", "fifo", base="inspect"),
    _known("--output", "link-to-file", base="inspect"),
    _known("--output", "mixed", base="import"),
    _known("--output", "mixed", "--overwrite", base="import"),
    _known("--output", "mixed", base="finetune"),
    _known("--output", "blocked", "--overwrite", base="import"),
    _known("--output", "model", "--overwrite", base="import"),
    *(
        _known("--output", output, "--format", form, *more, base="export")
        for form in ("transformers", "gguf")
        for output, more in (
            ("mixed", ()),
            ("mixed", ("--overwrite",)),
            ("model", ("--overwrite",)),
            ("blocked", ("--overwrite",)),
        )
    ),
    *(_known("--exit", layer, *more, base="export") for layer in ("0", "99") for more in ((), ("--engine", "vllm"))),
    *(_file("d.jsonl", b"[" * DEEP, "--data", "d.jsonl", base=base) for base in ("data", "bench", "finetune")),
    _file("h.jsonl.gz", gzip.compress(b"x" * 9000)[:40], "--data", "h.jsonl.gz", "--task", "humaneval", base="bench"),
    _file("h.jsonl.gz", b"not gzip", "--data", "h.jsonl.gz", "--task", "humaneval", base="bench"),
    *(
        _file("m.jsonl", _mbpp(**{key: 5}), "--data", "m.jsonl", "--task", "mbpp", base="bench")
        for key in ("text", "test_list")
    ),
    _file("m.jsonl", _mbpp(code=None), "--data", "m.jsonl", "--task", "mbpp", base="bench"),
    _file("w.csv", b"p" * 140_000 + b",completion\na,b\n", "--data", "w.csv", base="data"),
    _file("p.parquet", b"PAR1" + bytes(60) + b"PAR1", "--data", "p.parquet", "--streaming", "--samples", "0", base="finetune"),
    _file("p.parquet", b"PAR1" + bytes(60) + b"PAR1", "--data", "p.parquet", base="data"),
    _file("c.toml", b"steps = " + b"[" * 5000, "--config", "c.toml", base="finetune"),
    _known("--jsonl", stdin=b"[" * DEEP + b"\n"),
    _known("--jsonl", stdin=b'{"prompt": "\\ud800"}\n'),
    _known("--jsonl", "--batch-size", "2", stdin=b'{"prompt": "\\ud800"}\n{"prompt": "a"}\n'),
    _known("--", os.fsdecode(b"\xff\xfe")),
    _known("--stop", os.fsdecode(b"\xff")),
    _file("r.json", b"[" * DEEP, "--from", "r.json", base="bench"),
    _file("r.json", base64.b64decode("e30="), "--from", "r.json", base="sweep-exits"),
    *(_known("--output", output, base="calibrate") for output in ("mixed", "blocked", "file.txt", "dangling", "null", "")),
    *(_known(*more, base="verify") for more in (("--exits", "4"), ("--exits", "0"), ("--samples", "1"), ("--draws", "-1"))),
    *(_known("--kernels", name, base="verify") for name in ("cuda", "", ",", "amx,x")),
    *(_known("--output", output, base="verify") for output in ("file.txt", "dangling", "null", "", "/dev/null/x")),
    _known("--max-new-tokens", "127", base="verify"),
    _known("--kernels", "exact", "--specs", "100", base="verify"),
    *(_known("--length", length, base="calibrate") for length in ("1", "129", "10000000")),
    *(_known("--samples", count, base="calibrate") for count in ("0", "-1")),
    _known("--model", "{gemma3_text}", base="calibrate"),
    *(_known("--data", name, base="calibrate") for name in ("mixed", "file.txt", "/dev/zero", "fifo")),
    _file("c.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}\n', "--data", "c.jsonl", base="calibrate"),
    *(_known("--model", "{measured}", "--policy", name) for name in ("", "Exact", "x" * 3000)),
    _known("--model", "{measured}", "--policy", "fast", "--exit", "2"),
    *(_known("--exit-confidence", "0.5", "--exits", "1,2", *more) for more in (("--lookup", "2"), ("--spec", "3"))),
    _known("--strategy", "lookup", "--exit", "2"),
    *(_known("--draft-weights", names) for names in ("", ",", "int8,int2")),
    *(_known("--seed", seed, base=FROZEN) for seed in ("-1", str(2**32))),
    *(_known("--exits", exits, base=FROZEN) for exits in ("0", "4", "1:10000000000", "2:1", "")),
    *(_known("--answer-temperature", value, base=FROZEN) for value in ("1e-50", "1e-320", "nan", "inf", "-1", "1e308")),
    *(_known("--answer-tokens", value, base=FROZEN) for value in ("0", "-1", str(2**40))),
    *(_known("--max-length", value, base=FROZEN) for value in ("1", "2", "129")),
    *(_known("--lr", rate, base=FROZEN) for rate in ("inf", "nan", "100", "1e-300")),
    *(_known("--model", f"{{{name}}}", base=FROZEN) for name in ("adapter", "tiny.gguf")),
    *(_known("--output", output, base=FROZEN) for output in ("mixed", "model", "blocked", "file.txt", "dangling", "null", "")),
    *(_known("--model", "model", "--output", "model", *more, base=FROZEN) for more in ((), ("--overwrite",))),
    *(_known(*more, base=FROZEN_ON_DATA) for more in (("--answer-tokens", "3"), ("--answer-temperature", "0"))),
    *(_known(*more, base=FROZEN) for more in (("--lora-rank", "2"), ("--streaming",), ("--pack",), ("--distill", "0.5"))),
    *(_known("--exits", "2", *more, base="finetune") for more in (("--feature", "final"), ("--loss", "tv"))),
    _file("p.jsonl", b'{"prompt": "a"}\n', "--data", "p.jsonl", base=FROZEN_ON_DATA),
    _file("p.jsonl", b'{"prompt": "\\ud800"}\n', "--data", "p.jsonl", base=FROZEN),
    _file("p.txt", b"\n" * 9, "--data", "p.txt", base=FROZEN),
    _file("p.jsonl", b'{"prompt": "%s"}\n' % (b"x" * 9000), "--data", "p.jsonl", base=FROZEN),
    _known(environment={"WORLD_SIZE": "2"}, base=FROZEN),
    _going_on(),
    _going_on("--resume", "--lr", "0.5"),
    _going_on("--resume", spoil=_without("checkpoint-1/*")),
    _going_on("--resume", spoil=_answers(lambda text: text.replace("[", "[[", 1))),
    _going_on("--resume", spoil=_answers(lambda text: text.replace("}", "}}", 1))),
    _going_on("--resume", spoil=_answers(lambda text: json.dumps({"row": 0, "ids": [5] * 5000}) + "\n")),
    _going_on("--resume", spoil=_answers(lambda text: '{"row": 0, "ids": []}\n' + text)),
    _going_on("--resume", spoil=_answers(lambda text: json.dumps({"row": 2**70, "ids": [5]}) + "\n" + text)),
    _going_on("--resume", spoil=_answers(lambda text: '{"row": 0, "ids": [300]}\n')),
    _going_on("--resume", spoil=_answers(lambda text: "[" * DEEP + "\n")),
    _going_on("--resume", spoil=_states(lambda data: b"\xff" * len(data))),
    *(
        _known("--model", "{blocks}", *more)
        for more in (
            *(("--strategy", "early-exit", "--exit", "2"), ("--exit-confidence", "0.5", "--exits", "1,2")),
            *(("--exit", "4"), ("--draft-weights", "int8", "--exit", "5"), ("--skip", "9"), ("--exits", "1")),
        )
    ),
    _known("--model", "{blocks}", "--strategies", "autoregressive,early-exit", "--exit", "2", base="bench"),
    *(
        _known("--jsonl", "--model", "{measured}", *batch, stdin=b"".join(b'{"prompt": "a", %s}\n' % row for row in _ROWS))
        for batch in ((), ("--batch-size", "3"))
    ),
)

WORKING: tuple[Callable[[Case], Command], ...] = (  # these must succeed
    *(
        _known("--model", f"{{{name}}}", base=base, stdin=b"call")
        for name in _NAMED
        for base in ("generate", "bench", "inspect")
    ),
    *(_known("--model", f"{{{name}}}", "--exit", "2", "--spec", "3", stdin=b"call") for name in _NAMED),
    *(_known("--model", f"{{{name}}}", "--lines", "--batch-size", "2", stdin=b"call\nme") for name in _NAMED),
    *(_known("--model", f"{{{name}}}", "--exit", "2", base="bench") for name in _NAMED),
    *(_known("--model", f"{{{name}}}", base="sweep-exits") for name in _NAMED),
    *(_known("--model", f"{{{name}}}", base="finetune") for name in _NAMED),
    *(_known("--output", "new/deeper", base=base) for base in ("import", "finetune", "bench", "sweep-exits")),
    *(_known("--output", "plain", "--overwrite", base=base) for base in ("import", "finetune")),
    _known("--output", "training", "--save-steps", "1", "--overwrite", base="finetune"),
    *(_known("--output", output, "--overwrite", base="calibrate") for output in ("new/deeper", "plain")),
    *(_known("--model", "{measured}", "--policy", name) for name in ("exact", "fast", "confident", "copies")),
    _known("--model", "{measured}", "--policy", "confident", "--lines", "--batch-size", "2", stdin=b"call\nme"),
    *(_known("--model", "{measured}", "--strategy", name) for name in ("adaptive", "lookup", "draft-and-verify")),
    *(_known("--model", "{measured}", *flags) for flags in (("--exit-confidence", "0.5"), ("--quantize", "int4"))),
    _known("--model", "{measured}", "--baselines", "draft-and-verify", base="bench"),
    _known("--model", "{measured}", "--search-skips", "--exit-confidences", "0.5", base="sweep-exits"),
    *(_known("--model", f"{{{name}}}", base=FROZEN) for name in _COPIED),
    *(_known("--feature", "final", "--exits", "1,3", base=base) for base in (FROZEN, FROZEN_ON_DATA)),
    *(_known("--loss", "tv", "--answer-temperature", heat, base=FROZEN) for heat in ("1", "1e-320")),
    _known("--model", "plain", "--output", "plain", base=FROZEN),
    _known("--output", "plain", "--overwrite", base=FROZEN),
    _known("--model", "{blocks}", "--feature", "final", base=FROZEN),
    _file("p.jsonl", b'{"prompt": "a"}\n{"prompt": "b"}\n', "--data", "p.jsonl", base=FROZEN),
    _file("p.txt", b"one\ntwo\n", "--data", "p.txt", base=FROZEN),
    _going_on("--resume"),
    _going_on("--overwrite"),
    _going_on("--resume", "--dry-run"),
    _going_on("--resume", spoil=_answers(lambda text: text + '{"row": 0, "ids": [5')),
    _going_on("--resume", spoil=_without("answers-*.jsonl")),
    _going_on("--resume", spoil=_without("states-*")),
    _going_on(spoil=_without("checkpoint-*")),
    _going_on("--resume", spoil=_states(lambda data: data[:-100])),
    _going_on("--resume", spoil=_states(lambda data: data + data)),
    *(
        _known("--model", "{blocks}", *more, stdin=b"call mom")
        for more in (
            *((), ("--exit", "1"), ("--exit", "2", "--spec", "4"), ("--strategy", "early-exit", "--exit", "1")),
            *(("--exit-confidence", "0.5"), ("--exit-confidence", "0.5", "--exits", "1,3"), ("--temperature", "1")),
            *(
                ("--temperature", "1", "--exit", "2"),
                ("--draft-weights", "int8,int4"),
                ("--draft-weights", "int8", "--exit", "2"),
            ),
            *(
                ("--draft-vocab", "30"),
                ("--quantize", "int8"),
                ("--quantize", "int4", "--exit", "2"),
                ("--exact", "--spec", "3"),
            ),
            *(("--lookup", "2"), ("--strategy", "lookup"), ("--skip", "2"), ("--raw", "--dtype", "bf16", "--exit", "2")),
        )
    ),
    _known("--model", "{blocks}", "--lines", "--batch-size", "2", "--exit", "2", stdin=b"call\nme"),
    _known("--model", "{blocks}", "--exit", "1", "--baselines", "draft-and-verify", base="bench"),
    _known("--model", "{blocks}", "--batch-size", "2", base="bench"),
    _known("--model", "{blocks}", "--exits", "1,2,3", "--draft-weights", "int8", base="sweep-exits"),
    _known("--model", "{blocks}", "--exit-confidences", "0.5", base="sweep-exits"),
    *(_known("--output", output, base="verify") for output in ("new/deeper", "bench")),
    _known("--kernels", "exact,generic", "--draws", "20", "--exits", "1,3", base="verify"),
    *(_verified(name) for name in ("blocks", "gemma3_text", "tiny.gguf", "adapter")),
)

__all__ = ["CASES", "KNOWN", "SHORT", "WORKING", "attack"]
