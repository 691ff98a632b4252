"""A folder with files of a user, which no command may lose, and with objects in the way of outputs."""

import os
import shutil
from pathlib import Path

from .campaign import Case
from .outcome import Miss
from .snapshot import changes, snapshot

OUTPUTS = (
    *("new", "new/deeper/still", "mixed", "model", "plain", "bench", "training", "blocked", "model/config.json", "file.txt"),
    *("link-to-file", "link-to-folder", "dangling", "fifo", "null", "", ".", "..", "/dev/null/x", "a" * 300, "new\n", "~"),
    "new\udcff",
)


class Victim:
    """`home` is where a command runs. Its contents are compared before and after."""

    def __init__(self, case: Case) -> None:
        self.home = case.folder / "home"
        self.home.mkdir()
        (self.home / "file.txt").write_text("a user's file\n")
        for folder in ("mixed", "elsewhere"):
            self._foreign_files(self.home / folder)
        shutil.copytree(case.material.model(), self.home / "model")
        self._foreign_files(self.home / "model", chat=False)
        shutil.copytree(case.material.model(), self.home / "plain")
        (self.home / "plain" / "notes.md").write_text("mine")
        shutil.copytree(case.material.bench, self.home / "bench")
        shutil.copytree(case.material.training, self.home / "training")
        (self.home / "blocked").mkdir()
        shutil.copy(case.material.model() / "config.json", self.home / "blocked")
        (self.home / "blocked" / "x.safetensors").mkdir()
        (self.home / "blocked" / "x.safetensors" / "kept").write_text("kept")
        (self.home / "link-to-file").symlink_to("file.txt")
        (self.home / "link-to-folder").symlink_to("elsewhere")
        (self.home / "dangling").symlink_to("nowhere")
        os.mkfifo(self.home / "fifo")
        self._keep_open = os.open(self.home / "fifo", os.O_RDWR | os.O_NONBLOCK)  # else writing to it waits for a reader
        if os.getuid() == 0:
            try:
                os.mknod(self.home / "null", 0o20666, os.makedev(1, 3))  # a null device of our own
            except OSError:
                (self.home / "null").write_text("")
        self._before = snapshot(self.home)

    @staticmethod
    def _foreign_files(folder: Path, chat: bool = True) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "notes.md").write_text("mine")
        (folder / "my-own-embeddings.safetensors").write_bytes(b"mine")
        if chat:
            (folder / "chat_template_ideas.txt").write_text("mine")
            (folder / "model.safetensors").write_bytes(b"mine")

    def losses(self, changed: tuple[str, ...] = ()) -> list[Miss]:
        """What is gone or has changed; `changed`: paths that the command was asked to change."""
        os.close(self._keep_open)
        found = changes(self._before, snapshot(self.home), changed)
        return [Miss("lost", "; ".join(found[:6]))] if found else []

    def written_by_command(self, output: str, beside: bool) -> tuple[str, ...]:
        """What a successful command may change when it writes to this output: files of this program, no others.

        `beside`: it adds to the model there, whose own files stay as they are.
        """
        if beside:
            return tuple(f"{output}/{name}" for name in ("layerskip.json", "int4.safetensors", "exit_blocks.safetensors"))
        model = ("config.json", "generation_config.json", "model.safetensors", "tokenizer", "layerskip.json")
        mine = {
            "model": model,
            "plain": model,
            "blocked": ("config.json",),
            "bench": tuple(file.name for file in (self.home / "bench").iterdir()),
            "training": ("",),
        }
        if (file := (self.home / output).resolve()).is_file():  # the user asked for this file
            return (str(file.relative_to(self.home.resolve())),)
        return tuple(f"{output}/{name}" for name in mine.get(output, ()))
