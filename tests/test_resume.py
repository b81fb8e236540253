"""A quantization that is killed, changed, or robbed of its disk or source: nothing is lost."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from tiny_models import write_tiny_model

from flute_vllm.checkpoint import Checkpoint
from flute_vllm.errors import FluteError
from flute_vllm.quantize import feedback, finetune, model, recipes, stream
from flute_vllm.quantize.journal import JOURNAL, SCRATCH
from flute_vllm.quantize.learned import load_or_train
from flute_vllm.quantize.model import Callbacks, quantize_checkpoint
from flute_vllm.quantize.plan import QuantizeSettings, plan_checkpoint
from flute_vllm.validate import validate_checkpoint
from flute_vllm.writer import ShardWriter, file_nbytes

MODEL = Path(__file__).resolve().parents[1] / "examples" / "stdlib_model" / "model"
STEPS = [{"step": "search"}, {"step": "error_feedback"}, {"step": "refit_scales"}]


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory) -> Path:
    """Three blocks and a tokenizer, so that it can be calibrated."""
    folder = tmp_path_factory.mktemp("resume") / "dense"
    write_tiny_model(folder, "llama", vocab_size=4096, num_hidden_layers=3, hidden_size=128,
                     head_dim=32, intermediate_size=192)  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODEL / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> QuantizeSettings:
    recipe = {
        "name": "quick", "summary": "for tests", "needs": "activations", "steps": STEPS,
        "propagation": "sequential", "finetuning": {"epochs": 1, "tokens": 64},
    }  # fmt: skip
    path = tmp_path_factory.mktemp("recipe") / "quick.json"
    path.write_text(json.dumps(recipe))
    return QuantizeSettings(recipe=str(path), bits=3, samples=4, length=64, device="cpu",
                            lm_head=True)  # fmt: skip


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file; of report.json without its times."""
    found = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        if path.name == "report.json":
            report = json.loads(data)
            for module in (*report["modules"].values(), report["totals"]):
                module.pop("seconds")
            data = json.dumps(report).encode()
        found[path.name] = hashlib.sha256(data).hexdigest()
    return found


def count_events(patch: Callable[[object, str, Callable], None], on_event: Callable) -> None:
    """Calls ``on_event`` before each read, algorithm, write, sync, rename and removal."""
    points = (
        (Checkpoint, "load"), (feedback, "_inverse_factor"), (recipes, "relative_error"),
        (ShardWriter, "_write_at"), (os, "fsync"), (os, "rename"), (Path, "unlink"),
    )  # fmt: skip
    for owner, name in points:
        real = getattr(owner, name)

        def wrapped(*args, real=real, name=name, **kwargs):
            on_event(name)
            return real(*args, **kwargs)

        patch(owner, name, wrapped)


def run_in_child(work: Callable[[], None]) -> int:
    """Exit status of a forked process that does the work; negative for a signal."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # threads of the parent do not survive a fork
        try:
            work()
        except BaseException:  # noqa: BLE001 - pytest must not continue in the child
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in forked processes: sums of more threads differ in their last digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("one_thread")
def test_killed_at_random_moments(dense_folder, settings, tmp_path, monkeypatch):
    """20 times kill -9, at reads, in GPTQ, at writes, syncs and renames; the same bytes."""
    events: list[str] = []
    with monkeypatch.context() as patched:
        count_events(patched.setattr, events.append)
        quantize_checkpoint(dense_folder, tmp_path / "whole", settings)
    expected = hashes(tmp_path / "whole")
    assert {"load", "_inverse_factor", "_write_at", "rename", "unlink"} <= set(events)
    rng = random.Random(0)
    ends = [n for n, name in enumerate(events) if name in ("rename", "unlink")]
    moments = rng.sample(range(len(events)), 14) + rng.sample(ends, 2) + ends[-4:]
    for number, moment in enumerate(moments):
        out = tmp_path / f"out{number}"

        def work(moment=moment, out=out) -> None:
            seen: list[str] = []

            def on_event(name: str) -> None:
                if len(seen) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen.append(name)

            count_events(setattr, on_event)
            quantize_checkpoint(dense_folder, out, settings)

        assert run_in_child(work) == -signal.SIGKILL
        assert not (out / "config.json").exists() or (out / JOURNAL).exists()
        quantize_checkpoint(dense_folder, out, settings)
        assert hashes(out) == expected, f"killed at event {moment}, {events[moment]}"
        shutil.rmtree(out)


@pytest.mark.usefixtures("one_thread")
def test_tuning_that_was_killed_twice_is_left_out(dense_folder, settings, tmp_path, caplog):
    """As by the kernel where memory ends; once may be anybody, and the bytes are the same then."""
    quantize_checkpoint(dense_folder, tmp_path / "whole", settings)

    def work(out: Path) -> None:
        finetune._load_tuner = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        quantize_checkpoint(dense_folder, out, settings)

    for kills in (1, 2):
        out = tmp_path / f"out{kills}"
        for number in range(kills):
            assert run_in_child(lambda out=out: work(out)) == -signal.SIGKILL
            note = out.with_name(f"{out.name}.partial") / f"{SCRATCH}tuning.json"
            assert json.loads(note.read_text()) == {"begun": number + 1}
        report = quantize_checkpoint(dense_folder, out, settings)
        assert not list(out.glob(f"{SCRATCH}*"))
        if kills == 1:
            assert hashes(out) == hashes(tmp_path / "whole")
        else:
            assert "2 attempts were killed" in report["finetuning"]["left_out"]
            (told,) = [r.getMessage() for r in caplog.records if "not tuned" in r.getMessage()]
            assert "--restart" in told
            validate_checkpoint(Checkpoint(out))


def test_what_was_measured_before_the_first_block_is_kept(dense_folder, tmp_path, monkeypatch):
    """--bpw measures the whole model, which takes longer than a block."""
    settings = QuantizeSettings(bpw=3.0, calib="none", device="cpu", skip=("o_proj",))
    measured = []
    real = model.measure_losses

    def measure(*args):
        measured.append(args)
        return real(*args)

    def stop(report, unit) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "measure_losses", measure)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(dense_folder, tmp_path / "out", settings, Callbacks(on_module=stop))
    partial = tmp_path / "out.partial"
    assert (partial / f"{SCRATCH}losses.json").is_file()
    quantize_checkpoint(dense_folder, tmp_path / "out", settings)
    assert len(measured) == 1
    quantize_checkpoint(dense_folder, tmp_path / "whole", settings)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    assert not list((tmp_path / "out").glob(f"{SCRATCH}*"))


def test_a_scratch_file_that_is_not_complete_keeps_nothing(dense_folder, tmp_path, monkeypatch):
    def stop(*_args) -> None:
        unfinished = tmp_path / "out.partial" / f"{SCRATCH}losses.json.unfinished"
        unfinished.write_text("[")
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "measure_losses", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(dense_folder, tmp_path / "out", QuantizeSettings(bpw=3.0, calib="none"))
    assert not (tmp_path / "out.partial").exists()


@contextmanager
def small_files(nbytes: int) -> Iterator[None]:
    """No file of this process may grow beyond: what a full disk does, to this process alone."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_where_the_safetensors_library_writes(tmp_path):
    """It has an error of its own, which is no OSError."""
    path = tmp_path / "x.safetensors"
    with small_files(1 << 16), pytest.raises(FluteError, match="cannot write") as caught:
        load_or_train(path, lambda: {"a": torch.zeros(1 << 16)})
    assert caught.value.where == str(path)
    assert "File too large" in caught.value.why
    assert not path.exists()


def test_activations_are_told_of_on_a_full_disk(dense_folder, settings, tmp_path, monkeypatch):
    def full(tensors, path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(stream, "save_file", full)
        with pytest.raises(FluteError, match="No space left on device") as caught:
            quantize_checkpoint(dense_folder, tmp_path / "out", settings)
    assert SCRATCH in caught.value.where


def test_room_for_activations_is_reserved(dense_folder, settings, tmp_path, monkeypatch):
    """Three files at once of both paths, 4 windows x 64 tokens x 128 values of float32."""
    three = 3 * 2 * 4 * 64 * 128 * 4
    plan = plan_checkpoint(Checkpoint(dense_folder), settings)
    for free, fits in ((plan.file_nbytes + three - 1, False), (plan.file_nbytes + three, True)):
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        callbacks = stop_after(2, RuntimeError)
        with pytest.raises(RuntimeError if fits else FluteError) as caught:
            quantize_checkpoint(dense_folder, tmp_path / "out", settings, callbacks)
        if not fits:
            assert f"and {three:,} while it is made" in caught.value.why
    # Two of the files lie there when it goes on.
    left = sum(file_nbytes(unit.layout) for unit in plan.units[2:])
    there = sum(p.stat().st_size for p in (tmp_path / "out.partial").glob(f"{SCRATCH}0*"))
    assert 0.6 < there / three < 0.7
    usage.free = left + three - there - 1000  # a header's bytes are not counted
    with pytest.raises(FluteError, match="while it is made"):
        quantize_checkpoint(dense_folder, tmp_path / "out", settings)
    usage.free = left + three - there
    quantize_checkpoint(dense_folder, tmp_path / "out", settings)


def stop_after(units: int, error: type = KeyboardInterrupt) -> Callbacks:
    done = set()

    def on_module(report, unit) -> None:
        done.add(unit.name)
        if len(done) > units:
            raise error

    return Callbacks(on_module=on_module)


@pytest.fixture
def stopped(dense_folder, tmp_path) -> Path:
    """What Ctrl-C leaves after two of three blocks."""
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(dense_folder, tmp_path / "out", callbacks=stop_after(2))
    return tmp_path / "out"


def test_resume_goes_on_where_it_stopped(dense_folder, stopped):
    lines = (stopped.with_name("out.partial") / JOURNAL).read_text().splitlines()
    assert [json.loads(line)["unit"] for line in lines[1:]] == ["model.layers.0", "model.layers.1"]
    seen: dict[str, list] = {"resumed": [], "made": []}
    callbacks = Callbacks(
        on_resume=lambda plan, units: seen["resumed"].extend(units),
        on_module=lambda report, unit: seen["made"].append(unit.name),
    )
    quantize_checkpoint(dense_folder, stopped, callbacks=callbacks)
    assert seen["resumed"] == ["model.layers.0", "model.layers.1"]
    assert set(seen["made"]) == {"model.layers.2"}
    validate_checkpoint(Checkpoint(stopped))
    assert not (stopped / JOURNAL).exists()


@pytest.mark.parametrize(
    ("field", "changed"),
    [("bits", {"bits": 2}), ("recipe", {"recipe": "nf"}),
     ("overrides", {"overrides": {"o_proj": 2}}), ("skip", {"skip": ("o_proj",)}),
     ("scale_dtype", {"scale_dtype": "float16"})],
)  # fmt: skip
def test_changed_settings_are_refused_by_name(field, changed, dense_folder, stopped):
    with pytest.raises(FluteError, match="cannot resume with other settings") as caught:
        quantize_checkpoint(dense_folder, stopped, QuantizeSettings(**changed))
    assert caught.value.where.endswith(f": {field}")
    assert "--restart" in caught.value.fix
    assert "2 files are done" in caught.value.why


def test_a_changed_source_is_refused_and_restart_accepts_it(dense_folder, stopped, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(dense_folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(FluteError, match="cannot resume") as caught:
        quantize_checkpoint(other, stopped)
    assert "source config" in caught.value.where
    quantize_checkpoint(other, stopped, restart=True)
    assert Checkpoint(stopped).config["rms_norm_eps"] == 0.5


def test_a_half_written_journal_line_is_work_done_again(dense_folder, stopped, tmp_path):
    journal = stopped.with_name("out.partial") / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-20])
    quantize_checkpoint(dense_folder, stopped)
    quantize_checkpoint(dense_folder, tmp_path / "whole")
    assert hashes(stopped) == hashes(tmp_path / "whole")


def test_a_damaged_file_of_an_earlier_run_is_named(dense_folder, stopped):
    path = stopped.with_name("out.partial") / "model-00001-of-00004.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FluteError, match="cannot resume") as caught:
        quantize_checkpoint(dense_folder, stopped)
    assert caught.value.where == str(path)


def test_a_full_disk_loses_nothing(dense_folder, tmp_path, monkeypatch):
    real = ShardWriter._write_at

    def full(self, offset: int, data) -> None:
        if self._path.name.startswith("model-00003"):
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise FluteError("cannot write the output", where=str(self._path), why=str(error),
                             fix="free space") from error  # fmt: skip
        real(self, offset, data)

    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "_write_at", full)
        with pytest.raises(FluteError, match="No space left"):
            quantize_checkpoint(dense_folder, tmp_path / "out")
    quantize_checkpoint(dense_folder, tmp_path / "out")
    quantize_checkpoint(dense_folder, tmp_path / "whole")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_a_source_file_removed_at_work(dense_folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(dense_folder, source)

    def remove(report, unit) -> None:
        if unit.name == "model.layers.1":
            (source / "model.safetensors").unlink(missing_ok=True)

    with pytest.raises(FluteError, match="cannot read a weight") as caught:
        quantize_checkpoint(source, tmp_path / "out", callbacks=Callbacks(on_module=remove))
    assert "model.layers.1" in caught.value.where
    shutil.copyfile(dense_folder / "model.safetensors", source / "model.safetensors")
    quantize_checkpoint(source, tmp_path / "out")
    validate_checkpoint(Checkpoint(tmp_path / "out"))


def test_a_weight_with_nan_stops_with_its_name_and_keeps_the_rest(dense_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    source = tmp_path / "source"
    shutil.copytree(dense_folder, source)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"
    tensors[name][3, 5] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FluteError, match="not finite") as caught:
        quantize_checkpoint(source, tmp_path / "out")
    assert caught.value.where == name
    assert "[3, 5]" in caught.value.why
    assert (tmp_path / "out.partial" / "model-00002-of-00004.safetensors").exists()


def test_other_settings_begin_anew_where_no_file_is_done(dense_folder, tmp_path, caplog):
    """What --bpw measured is kept when the target proves too low; the next run asks for more."""
    settings = QuantizeSettings(recipe="nf", bpw=2.0, calib="none", group_size=32, device="cpu")
    with pytest.raises(FluteError, match="too few bits"):
        quantize_checkpoint(dense_folder, tmp_path / "out", settings)
    assert list((tmp_path / "out.partial").glob("flute-scratch-*"))
    plain = dataclasses.replace(settings, bpw=None)
    with caplog.at_level("WARNING", logger="flute_vllm"):
        quantize_checkpoint(dense_folder, tmp_path / "out", plain)
    assert "begun anew" in caplog.text
    validate_checkpoint(Checkpoint(tmp_path / "out"))
