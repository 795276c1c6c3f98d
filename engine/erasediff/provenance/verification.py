"""Verification of a run against its receipt: every hash and every figure is derived again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from erasediff.config import Config, load_config
from erasediff.data.image_lists import FORGET
from erasediff.errors import UserError
from erasediff.io.json_file import parse_object, read_object
from erasediff.io.user_file import MEGABYTE, read_bytes
from erasediff.models.checkpoint.base import Checkpoint
from erasediff.provenance.canonical import DIGEST, canonical_json, content_sha256
from erasediff.provenance.digests import describe_files, file_sha256
from erasediff.provenance.faults import Fault, differences, file_differences, shown
from erasediff.provenance.image_digests import image_faults, listed_digests
from erasediff.provenance.moves import measure_moves
from erasediff.provenance.receipt import FORMAT
from erasediff.provenance.run_figures import run_figures
from erasediff.provenance.run_files import (
    RECEIPT,
    SIGNATURE,
    VERDICT,
    checkpoint_files,
    covered_files,
    may_be_added,
    open_output,
    open_source,
    output_model,
)
from erasediff.provenance.ssh_signature import signature_fault
from erasediff.provenance.verdict_evidence import verdict_faults
from erasediff.training.run_dir import CONFIG

LARGEST_RECEIPT = 1000 * MEGABYTE


@dataclass(slots=True)
class Verification:
    """Result of a verification.

    Attributes:
        faults: Everything that is not as the receipt says.
        notes: What was not checked, in sentences.
        files: Number of files that were hashed.
        tensors: Number of tensors that were.
    """

    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: int = 0
    tensors: int = 0


def verify_run(
    run: Path, *, base: Path | None = None, data: Path | None = None, signers: Path | None = None
) -> Verification:
    """Derive again all that the receipt of a run says, from files alone.

    Args:
        run: Folder of the run.
        base: The model that was unlearned from; None for where the receipt says that it is, seen from ``run``.
        data: The data set, to hash its images again; None leaves them out.
        signers: File of allowed signers, by one of whom the receipt must be signed; None checks a signature that is
            there, but not whose it is.

    Raises:
        UserError: There is no receipt in ``run``, or something that was named, or that the receipt names as the run's
            input, is not there.
    """
    return _Verifier(run, base, data, signers).run_all()


class _Verifier:
    def __init__(self, run: Path, base: Path | None, data: Path | None, signers: Path | None) -> None:
        self.run, self.base, self.data, self.signers = run, base, data, signers
        self.result = Verification()
        self.model = self._guarded(VERDICT, lambda: output_model(run))
        try:
            self.content = read_bytes(run / RECEIPT, LARGEST_RECEIPT)
            self.receipt = parse_object(self.content)
        except OSError:
            raise UserError(f"There is no {RECEIPT} in {run}: name the folder of a run that has ended.") from None
        except ValueError as error:
            raise UserError(f"{run / RECEIPT} is no receipt: {error}.") from None
        if self.receipt.get("format") != FORMAT:
            raise UserError(f"{run / RECEIPT} is no receipt of format {FORMAT}: verify it with the erasediff of it.")

    def run_all(self) -> Verification:
        self._add(self._own_faults())
        self._add(self._signature_faults())
        self._add(self._file_faults())
        config = self._guarded(CONFIG, lambda: load_config(self.run / CONFIG))
        if config is not None:
            self._add(self._setting_faults(config))
            self._add(self._input_faults(config))
        self._add(self._figure_faults())
        if self.data is not None and config is not None:
            self._add(self._image_faults(config, self.data))
        elif self.receipt_figure(FORGET) is not None:
            self.result.notes.append("The images were not hashed again: name their folder with --data.")
        return self.result

    def _add(self, faults: Iterable[Fault]) -> None:
        # One by one: looking for them may add one of a damaged file.
        for fault in faults:
            self.result.faults.append(fault)

    def receipt_figure(self, name: str) -> Any:
        figures = self.receipt.get("figures")
        return figures.get(name) if isinstance(figures, Mapping) else None

    def _own_faults(self) -> Iterator[Fault]:
        yield from differences(f"{RECEIPT}, {DIGEST}", self.receipt.get(DIGEST), content_sha256(self.receipt))
        if self.content != canonical_json(self.receipt):
            yield Fault(RECEIPT, "canonical JSON", "another form of it")

    def _signature_faults(self) -> Iterator[Fault]:
        path = self.run / SIGNATURE
        if not path.is_file():
            if self.signers is not None:
                yield Fault(SIGNATURE, "a signature", "no such file")
            return
        fault = signature_fault(self.content, path, self.signers)
        if fault is not None:
            yield Fault(SIGNATURE, f"a signature of {RECEIPT}", fault)
        elif self.signers is None:
            self.result.notes.append("The receipt is signed; whose key it is was not checked: name it with --signer.")

    def _file_faults(self) -> Iterator[Fault]:
        expected = _mapping(self.receipt.get("files"))
        present = dict(covered_files(self.run))
        added = [name for name in present if name not in expected and may_be_added(name, self.model)]
        if added:
            self.result.notes.append(f"Not covered by the receipt: {shown(', '.join(added))}.")
        found = self._described([(name, path) for name, path in present.items() if name not in added])
        yield from file_differences("", expected, found)
        evidence = _mapping(self.receipt.get("evidence"))
        hashes = {name: found[name]["sha256"] if name in found else None for name in evidence}
        yield from differences("evidence", evidence, hashes)

    def _described(self, files: list[tuple[str, Path]]) -> dict[str, Any]:
        found = describe_files(files)
        self.result.files += len(found)
        self.result.tensors += sum(len(record.get("tensors") or ()) for record in found.values())
        return found

    def _setting_faults(self, config: Config) -> Iterator[Fault]:
        yield from differences("seeds", self.receipt.get("seeds"), {"seed": config.seed})
        asked = set(_requests(config))
        if config.unlearn.forget or not asked:
            return
        for request in _mapping(_mapping(self.receipt_figure(FORGET)).get("requests")):
            kind = request.partition(": ")[0]
            if kind in ("class", "phrase", "prompt") and request not in asked:
                yield Fault(f"{FORGET}.jsonl, {request}", f"a request of {CONFIG}", request)

    def _input_faults(self, config: Config) -> Iterator[Fault]:
        inputs = _mapping(self.receipt.get("input"))
        for name in sorted(inputs.keys() - {"model"}):
            yield from self._listed_faults(name, _mapping(inputs[name]))
        recorded = inputs.get("model")
        trained_anew = self.receipt.get("command") == "train"
        if not isinstance(recorded, Mapping):
            if self.base is not None:
                raise UserError(f"The run in {self.run} had no model as its input: omit --base.")
            if not trained_anew:
                yield Fault(f"{RECEIPT}, input", "a model", shown(recorded))
            return
        named = config.unlearn.model
        if named is None or recorded.get("name") not in (str(named), named.name):
            yield Fault(f"{CONFIG}, unlearn.model", shown(recorded.get("name")), shown(named))
        path = self.base or self.run / str(recorded.get("path"))
        if not path.exists():
            raise UserError(f"The model that the run was unlearned from is not at {path}: name it with --base.")
        source = open_source(config, path)
        files = list(checkpoint_files(source))
        expected = _mapping(recorded.get("files"))
        if len(files) == len(expected) == 1:
            # A single file may have been renamed.
            files = [(next(iter(expected)), files[0][1])]
        yield from file_differences("input/", expected, self._described(files))
        yield from self._chain_faults(source, expected)
        yield from self._move_faults(config, source)

    def _listed_faults(self, kind: str, recorded: Mapping[str, Any]) -> Iterator[Fault]:
        path = self.run / str(recorded.get("path"))
        expected = _mapping(recorded.get("files"))
        found = self._described([(name, path) for name in expected if path.is_file()])
        yield from file_differences(f"{kind}/", expected, found)

    def _chain_faults(self, source: Checkpoint, model: Mapping[str, Any]) -> Iterator[Fault]:
        previous = _mapping(self.receipt.get("previous"))
        receipt = source.path.absolute().parent / RECEIPT
        found = file_sha256(receipt) if receipt.is_file() else None
        yield from differences("previous receipt", previous.get("sha256"), found)
        if found is None:
            return
        made = _mapping(self._guarded(str(receipt), lambda: read_object(receipt))).get("files")
        within = f"{source.path.name}/" if source.path.is_dir() else ""
        for name, record in model.items():
            stated = _mapping(_mapping(made).get(f"{within}{name}")).get("sha256")
            yield from differences(f"previous receipt, {within}{name}", stated, _mapping(record).get("sha256"))

    def _move_faults(self, config: Config, source: Checkpoint) -> Iterator[Fault]:
        model, stated = self.model, self.receipt.get("moves")
        if model is None:
            yield from differences("moves", stated, None)
            return
        found = self._guarded(model.name, lambda: measure_moves(source, open_output(config, model, source)))
        if found is None:
            return
        if not found["moved"] and not found["added"]:
            yield Fault(model.name, "another model than the one it was unlearned from", "that model")
        for part in ("moved", "unmoved", "added", "removed", "l2"):
            yield from differences(f"moves, {part}", _mapping(stated).get(part), found[part])

    def _figure_faults(self) -> Iterator[Fault]:
        figures = self._guarded("figures", lambda: run_figures(self.run))
        if figures is None:
            return
        yield from differences("figures", self.receipt.get("figures"), figures)
        if figures["verdict"] is not None:
            yield from self._guarded(VERDICT, lambda: list(verdict_faults(self.run, figures["verdict"]))) or ()

    def _image_faults(self, config: Config, data: Path) -> Iterator[Fault]:
        location = config.images.data
        if location is None:
            raise UserError(f"The run in {self.run} read no data set of images: omit --data.")
        listed = self._guarded("images", lambda: listed_digests(self.run, location))
        yield from image_faults(config, listed or (), data)

    def _guarded(self, what: str, read: Callable[[], Any]) -> Any:
        """Result of ``read``; None where a file is damaged, which is a fault."""
        try:
            return read()
        except UserError as error:
            self.result.faults.append(Fault(what, "what can be read", str(error)))
            return None


def _requests(config: Config) -> Iterator[str]:
    """Requests of a configuration as lists of images name them."""
    images = config.images
    yield from (f"class: {name}" for name in images.forget_classes)
    yield from (f"phrase: {phrase}" for phrase in images.forget_phrases)
    yield from (f"prompt: {prompt}" for prompt in images.forget_prompts)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
