"""SSH signatures of receipts, by ``ssh-keygen -Y`` in the namespace "erasediff"."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from erasediff.errors import UserError
from erasediff.io.user_file import check_regular

NAMESPACE = "erasediff"
PREFIX = "ssh:"


@dataclass(frozen=True, slots=True)
class SshKey:
    """SSH key that signs: a private key, or a public one whose private half an agent holds."""

    path: Path

    @classmethod
    def named(cls, name: str) -> SshKey:
        """Key of ``--sign ssh:FILE``, which is tried out.

        Raises:
            UserError: It is another kind of key, or it cannot sign.
        """
        if not name.startswith(PREFIX) or name == PREFIX:
            raise UserError(f"--sign {name} names no key: give --sign ssh:FILE, a file with an SSH key.")
        key = cls(Path(name.removeprefix(PREFIX)).absolute())
        check_regular(key.path)
        if not key.path.is_file():
            raise UserError(f"There is no SSH key in {key.path}: make one with ssh-keygen, or name another.")
        key.sign(b"")
        return key

    def sign(self, content: bytes) -> bytes:
        """Signature of ``content`` as an armored SSHSIG. UserError where ``ssh-keygen`` refuses the key."""
        ended = _ssh_keygen("sign", "-f", str(self.path), content=content)
        if ended.returncode:
            raise UserError(f"The SSH key {self.path} cannot sign: {_last_line(ended.stderr)}; add it to ssh-agent.")
        return ended.stdout


def signature_fault(content: bytes, signature: Path, signers: Path | None) -> str | None:
    """Fault of a signature, in words; None for one that is right.

    Args:
        content: What was signed.
        signature: File with the signature.
        signers: File of allowed signers, as ``ssh-keygen`` describes it; None to check no identity.

    Raises:
        UserError: There is no file ``signers``.
    """
    if signers is None:
        ended = _ssh_keygen("check-novalidate", "-s", str(signature), content=content)
        return _last_line(ended.stderr or ended.stdout) if ended.returncode else None
    check_regular(signers)
    if not signers.is_file():
        raise UserError(f"There is no file of allowed signers {signers}: name one with --signer.")
    ended = _ssh_keygen("find-principals", "-s", str(signature), "-f", str(signers), namespace=False)
    principals = ended.stdout.decode(errors="replace").splitlines()
    if ended.returncode or not principals:
        return f"a key that {signers.name} does not name"
    ended = _ssh_keygen("verify", "-I", principals[0], "-s", str(signature), "-f", str(signers), content=content)
    return f"{_last_line(ended.stderr or ended.stdout)} ({principals[0]})" if ended.returncode else None


def _ssh_keygen(
    action: str, *arguments: str, content: bytes = b"", namespace: bool = True
) -> subprocess.CompletedProcess[bytes]:
    program = shutil.which("ssh-keygen")
    if program is None:
        raise UserError("There is no ssh-keygen for signatures: install OpenSSH 8.2 or later.")
    space = ("-n", NAMESPACE) if namespace else ()
    # In a session of its own there is no terminal to ask for a passphrase, hours after the run was started.
    return subprocess.run(
        [program, "-Y", action, *space, *arguments],
        input=content,
        capture_output=True,
        check=False,
        start_new_session=True,
    )


def _last_line(output: bytes) -> str:
    lines = output.decode(errors="replace").strip().splitlines()
    return lines[-1].strip().rstrip(".") if lines else "ssh-keygen gives no reason"
