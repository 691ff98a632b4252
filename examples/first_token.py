"""Time to the first token and peak memory of a model packed at load, and of one that `layerskip export --format packed` wrote.

    python examples/first_token.py make FOLDER [--hidden 2048 --inner 8192 --layers 16 --heads 32 --kv-heads 8 --vocab 49152]
                                               [--type llama --values JSON]
    python examples/first_token.py measure MODEL... [--settings bf16,int8,int4] [--repeats N] [--tokens N] [--cold]

`make` writes a model of random bf16 weights (by default a Llama of 1.07B, with a tied head), a file for each layer, with the
tokenizer of the embedded model. `--values` are further values of config.json, as those of experts. `measure` decodes in a fresh
process for each run, and prints a table of medians: seconds of loading and to the first token after the imports, peak resident
memory and its share above that after the imports, and milliseconds for each further token. A setting of a packed folder is
`packed`. `--cold` drops the model's files from the page cache before each run.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

FAMILY = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "dtype": "bfloat16"}


def make(arguments: argparse.Namespace) -> None:
    """One layer at a time, so that a model larger than the memory can be made."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from layerskip_core.checkpoint.locate import locate
    from layerskip_core.model import ModelSpec

    folder, source = Path(arguments.folder), Path(locate("embedded").path)
    folder.mkdir(parents=True)
    config = AutoConfig.for_model(
        arguments.type, vocab_size=arguments.vocab, hidden_size=arguments.hidden, intermediate_size=arguments.inner,
        num_hidden_layers=arguments.layers, num_attention_heads=arguments.heads, num_key_value_heads=arguments.kv_heads,
        tie_word_embeddings=not arguments.untied, bos_token_id=1, eos_token_id=2, **FAMILY,
        **json.loads(arguments.values),
    )  # fmt: skip
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)
    spec, generator = ModelSpec.of(config), torch.Generator().manual_seed(0)
    parts: dict[str, list[str]] = {}
    for name in spec.shapes:
        parts.setdefault(name.split(".")[2] if name.startswith("model.layers.") else name, []).append(name)
    index: dict[str, str] = {}
    for number, names in enumerate(parts.values(), 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file({name: random_weight(spec.shapes[name], generator) for name in names}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(names, file)
    document = {"metadata": {"total_size": 2 * spec.parameters}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))
    print(f"{spec.parameters / 1e9:.2f}B weights in {folder}")


def random_weight(shape, generator):
    import torch

    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def run_once(model: str, setting: str, tokens: int) -> None:
    """In a process of its own: prints one JSON object."""
    from layerskip_core.checkpoint.open import for_decoding
    from layerskip_core.config.decoding import DecodingConfig
    from layerskip_core.config.model import PackingConfig
    from layerskip_core.decoding import decode

    imported, started = memory("VmRSS"), time.perf_counter()
    quantize = setting if setting in ("int8", "int4") else None
    loaded = for_decoding(model, "cpu", "auto", PackingConfig(quantize))
    ready = time.perf_counter()
    times = []
    for _ in decode(loaded.backend, [1, 5, 9, 33], DecodingConfig("autoregressive", max_new_tokens=tokens), frozenset()):
        times.append(time.perf_counter())
    steps = [after - before for before, after in pairwise(times)]
    print(
        json.dumps(
            {
                "load": ready - started,
                "first": times[0] - started,
                "peak": memory("VmHWM"),
                "above": memory("VmHWM") - imported,
                "step": 1000 * median(steps) if steps else 0.0,
            }
        )
    )


def memory(name: str) -> float:
    """Megabytes that this process has, or had at most, in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{name}:"))


def drop_from_cache(model: str) -> None:
    for path in Path(model).iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)  # pages that are not yet on disk cannot be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(arguments: argparse.Namespace) -> None:
    print("| model | weights | load, s | first token, s | peak memory, MB | above imports, MB | a further token, ms |")
    print("|---|---|---|---|---|---|---|")
    for model in arguments.models:
        packed = (Path(model) / "packed.safetensors").exists()
        for setting in ("packed",) if packed else arguments.settings.split(","):
            runs = []
            for _ in range(arguments.repeats):
                if arguments.cold:
                    drop_from_cache(model)
                command = [sys.executable, __file__, "once", model, setting, "--tokens", str(arguments.tokens)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                runs.append(json.loads(done.stdout))
            load, first, peak, above, step = (median(run[key] for run in runs) for key in runs[0])
            print(
                f"| {Path(model).name} | {setting} | {load:.2f} | {first:.2f} | {peak:,.0f} | {above:,.0f} | {step:.1f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    maker = commands.add_parser("make")
    maker.add_argument("folder")
    sizes = {"hidden": 2048, "inner": 8192, "layers": 16, "heads": 32, "kv-heads": 8, "vocab": 49152}
    for name, size in sizes.items():
        maker.add_argument(f"--{name}", type=int, default=size)
    maker.add_argument("--type", default="llama", help="model_type of transformers")
    maker.add_argument("--values", default="{}", metavar="JSON")
    maker.add_argument("--untied", action="store_true", help="a head of its own")
    measurer = commands.add_parser("measure")
    measurer.add_argument("models", nargs="+")
    measurer.add_argument("--settings", default="bf16,int8,int4")
    measurer.add_argument("--repeats", type=int, default=3)
    measurer.add_argument("--cold", action="store_true")
    once = commands.add_parser("once")
    once.add_argument("model")
    once.add_argument("setting")
    for command in (measurer, once):
        command.add_argument("--tokens", type=int, default=8)
    arguments = parser.parse_args()
    if arguments.command == "make":
        make(arguments)
    elif arguments.command == "measure":
        measure(arguments)
    else:
        run_once(arguments.model, arguments.setting, arguments.tokens)


if __name__ == "__main__":
    main()
