"""Atomic writes: the files that remain after an interrupted write."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from erasediff.errors import UserError
from erasediff.io.atomic import atomic_directory, atomic_write, remove_abandoned, remove_directory, remove_leftovers
from erasediff.io.temporary_names import temporary_name


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_appears_with_all_its_files(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "deep" / "model") as folder:
        (folder / "unet").mkdir()
        (folder / "unet" / "weights").write_text("w")
        assert not (tmp_path / "deep" / "model").exists()
    assert (tmp_path / "deep" / "model" / "unet" / "weights").read_text() == "w"
    assert names(tmp_path / "deep") == ["model"]


@pytest.mark.parametrize("cause", [RuntimeError("bug"), KeyboardInterrupt()])
@pytest.mark.parametrize("existed", [True, False])
def test_a_block_that_fails_leaves_things_as_they_were(tmp_path: Path, cause: BaseException, existed: bool) -> None:
    target = tmp_path / "model"
    if existed:
        target.mkdir()
        (target / "old").write_text("old")

    def fail_half_way() -> None:
        with atomic_directory(target, replace=True) as folder:
            (folder / "new").write_text("new")
            raise cause

    with pytest.raises(type(cause)):
        fail_half_way()
    assert names(tmp_path) == (["model"] if existed else [])
    assert not existed or names(target) == ["old"]


def test_nothing_is_replaced_unless_asked(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="exists already"), atomic_directory(tmp_path / "model"):
        pytest.fail("the block must not run")
    with atomic_directory(tmp_path / "model", replace=True) as folder:
        (folder / "new").write_text("new")
    assert names(tmp_path / "model") == ["new"]
    assert names(tmp_path) == ["model"]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="disk is full"), atomic_directory(tmp_path / "model") as folder:
        (folder / "file").write_text("text")
    (tmp_path / "old.txt").write_text("old")
    with pytest.raises(UserError, match="disk is full"):
        atomic_write(tmp_path / "old.txt", "new")
    assert names(tmp_path) == ["old.txt"]
    assert (tmp_path / "old.txt").read_text() == "old"


def test_safetensors_own_errors_count_as_a_full_disk(tmp_path: Path) -> None:
    """A file size limit stands in for the disk's; safetensors reports it in its own exception."""
    code = f"""
import resource, torch
from pathlib import Path
from safetensors.torch import save_file
from erasediff.errors import UserError
from erasediff.io import atomic
import errno
errno.ENOSPC = errno.EFBIG
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    with atomic.atomic_directory(Path({str(tmp_path / "model")!r})) as folder:
        save_file({{"x": torch.ones(100_000)}}, folder / "x.safetensors")
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "disk is full" in done.stdout
    assert names(tmp_path) == []


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare to mount a small file system")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
import torch
from safetensors.torch import save_file
from erasediff.errors import UserError
from erasediff.io.atomic import atomic_directory, atomic_write
disk = Path({str(tmp_path)!r})
def with_safetensors(path): save_file({{"x": torch.ones(1_000_000)}}, path)
def with_python(path): path.write_bytes(b"0" * 4_000_000)
for write in (with_safetensors, with_python):
    try:
        with atomic_directory(disk / "model") as folder:
            write(folder / "x")
    except UserError as error:
        print(error)
print(list(disk.iterdir()))
"""
    mounted = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    script = 'mount -t tmpfs -o size=1M none "$1" || exit 77; exec "$2" -c "$3"'
    done = subprocess.run(
        [*mounted, script, "sh", str(tmp_path), sys.executable, code], capture_output=True, text=True, check=False
    )
    if done.returncode in (1, 77) and "Traceback" not in done.stderr:
        pytest.skip("mounting is not allowed here")
    assert done.stdout.count("disk is full") == 2, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_path_that_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "inner", tmp_path / "file" / "inner" / "deeper", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match=r"Cannot write .*: (not a directory|file exists|file name too long)\."):
            atomic_write(path, "text")


def test_a_kill_leaves_only_what_the_next_start_removes(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from erasediff.io.atomic import atomic_directory
with atomic_directory(Path({str(tmp_path / "model")!r})) as folder:
    (folder / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "model").exists()
    assert len(names(tmp_path)) == 1
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_removal_leaves_no_half_folder_under_the_name(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "model" / "x")
    remove_directory(tmp_path / "model")
    remove_directory(tmp_path / "absent")
    assert names(tmp_path) == []


def test_what_a_living_process_writes_stays(tmp_path: Path) -> None:
    ours = temporary_name("file")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    machine = ours.removeprefix(".file.").partition("-")[0]
    dead, elsewhere, old = (
        f".file.{on}-{gone.pid}-{n}1234567.partial" for n, on in ((0, machine), (1, "f" * 8), (2, "f" * 8))
    )
    others = (".movie.partial", "file", ".file.replaced")
    for name in (ours, dead, elsewhere, old, *others):
        (tmp_path / name).write_text("")
    os.utime(tmp_path / old, (0, 0))
    remove_abandoned(tmp_path)
    assert names(tmp_path) == sorted([ours, elsewhere, *others])
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted(others)


def test_a_write_removes_what_a_killed_one_left_beside_it(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from erasediff.io.atomic import atomic_file
with atomic_file(Path({str(tmp_path / "cache" / "shard")!r})) as partial:
    partial.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert len(names(tmp_path / "cache")) == 1
    atomic_write(tmp_path / "cache" / "another", "whole")
    assert names(tmp_path / "cache") == ["another"]
