"""The flute-vllm command: output, exit codes, and a real process that is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_models import write_tiny_model
from typer.testing import CliRunner

from flute_vllm import __version__
from flute_vllm.checkpoint import Checkpoint
from flute_vllm.cli import app
from flute_vllm.validate import validate_checkpoint

ROOT = Path(__file__).resolve().parent.parent
ZOO = Path(__file__).parent / "data" / "ckpt_w4"


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def process(*arguments: object) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    return subprocess.Popen(
        [sys.executable, "-m", "flute_vllm.cli", *map(str, arguments)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A test runner in the background inherits an ignored SIGINT, and hands it on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("cli") / "dense", "llama")


@pytest.fixture(scope="module")
def native_folder(dense_folder) -> Path:
    out = dense_folder.parent / "native"
    result = run("quantize", dense_folder, out, "--override", "re:.*down_proj=3")
    assert result.exit_code == 0, result.output
    assert "14 modules at" in result.stdout
    assert "plan: 14 modules to 3, 4 bits, groups of 64" in result.stderr
    return out


def test_version_and_help():
    assert run("version").stdout.strip() == __version__
    assert "dequantize" in run("--help").stdout


def test_help_loads_nothing_heavy():
    program = (
        "import sys; from typer.testing import CliRunner; from flute_vllm.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "sys.exit(bool({'torch', 'transformers', 'pydantic'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", program], env=environment).returncode == 0


def test_quantize_options(dense_folder, tmp_path):
    result = run(
        "quantize", dense_folder, tmp_path / "out", "--bits", 2, "--group-size", -1, "--recipe",
        "nf", "--scale-dtype", "float16", "--skip", "o_proj", "--skip", "down_proj",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    config = validate_checkpoint(Checkpoint(tmp_path / "out"))
    assert (config.bits, config.group_size, config.scale_dtype) == (2, -1, "float16")
    assert config.modules_to_not_convert == ["o_proj", "down_proj", "lm_head"]


def test_quantize_with_a_pair_table(dense_folder, tmp_path):
    values = [[x / 2, y] for x in (-2, -1, 1, 2) for y in (-1, -0.3, 0.3, 1)]
    table = {"bits": 2, "table_kind": "pair", "values": values}
    (tmp_path / "table.json").write_text(json.dumps(table))
    result = run(
        "quantize", dense_folder, tmp_path / "out", "--bits", 2, "--table",
        tmp_path / "table.json", "--override", "down_proj=4", "--recipe", "nf",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    checkpoint = Checkpoint(tmp_path / "out")
    config = validate_checkpoint(checkpoint)
    assert config.table_kind == "pair"
    assert config.spec_for("model.layers.0.mlp.down_proj").table_kind == "scalar"
    assert checkpoint.tensors["model.layers.0.mlp.up_proj.table"].shape == (16, 2)


def test_dry_run_tells_the_exact_size(dense_folder, native_folder, tmp_path):
    result = run(
        "quantize", dense_folder, tmp_path / "x", "--override", "re:.*down_proj=3", "--dry-run"
    )
    assert result.exit_code == 0, result.output
    assert f"output {Checkpoint(native_folder).nbytes:,} bytes" in result.stderr
    assert not list(tmp_path.iterdir())


def test_dry_run_shows_the_memory_of_a_70b_model(tmp_path):
    """By arithmetic from headers alone: a 64 GB host with a 24 GB GPU is enough."""
    from flute_vllm.quantize.memory import memory_parts
    from flute_vllm.quantize.plan import QuantizeSettings, plan_checkpoint
    from flute_vllm.quantize.progress import memory_totals

    folder = write_large_headers(tmp_path / "70b")
    for recipe in ("fast", "balanced", "best"):
        settings = QuantizeSettings(recipe=recipe)
        checkpoint = Checkpoint(folder)
        plan = plan_checkpoint(checkpoint, settings)
        parts = memory_parts(checkpoint, plan, settings, "cuda")
        host, gpu = memory_totals(parts, "cuda")
        assert host < 64e9, (recipe, host)
        assert gpu < 24e9, (recipe, gpu)


def write_large_headers(folder: Path) -> Path:
    """LLaMA-70B shapes, two blocks, as sparse files: headers are real, the data are holes."""
    hidden, mlp, kv = 8192, 28672, 1024
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden,
        "intermediate_size": mlp, "num_hidden_layers": 2, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
        "tie_word_embeddings": False,
    }  # fmt: skip
    shapes = {"model.embed_tokens": (128256, hidden), "lm_head": (128256, hidden)}
    for index in range(2):
        block = f"model.layers.{index}"
        for name, rows, columns in (
            ("q", hidden, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, hidden),
        ):  # fmt: skip
            shapes[f"{block}.self_attn.{name}_proj"] = (rows, columns)
        shapes |= {f"{block}.mlp.{n}_proj": (mlp, hidden) for n in ("gate", "up")}
        shapes[f"{block}.mlp.down_proj"] = (hidden, mlp)
    header, end = {}, 0
    for name, (rows, columns) in shapes.items():
        begin, end = end, end + 2 * rows * columns
        header[f"{name}.weight"] = {
            "dtype": "BF16", "shape": [rows, columns], "data_offsets": [begin, end],
        }  # fmt: skip
    encoded = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
    return folder


def test_too_little_ram_is_refused_before_work(dense_folder, tmp_path):
    result = run("quantize", dense_folder, tmp_path / "out", "--ram", "0.1", "--device", "cpu")
    assert result.exit_code == 1
    assert "not enough memory for this plan" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_run_that_stopped_is_refused_with_other_settings(dense_folder, tmp_path, monkeypatch):
    """Through the command: resume, the field's name, --restart."""
    from flute_vllm.quantize import model

    real = model._write_group
    with monkeypatch.context() as patched:

        def stop(shard, group, state, checkpoint):
            if group[0].startswith("model.layers.1"):
                raise KeyboardInterrupt
            real(shard, group, state, checkpoint)

        patched.setattr(model, "_write_group", stop)
        stopped = run("quantize", dense_folder, tmp_path / "out", "--recipe", "nf")
    assert stopped.exit_code == 130
    assert "the same command goes on" in stopped.stderr
    other = run("quantize", dense_folder, tmp_path / "out", "--recipe", "nf", "--bits", 3)
    assert other.exit_code == 1
    assert ": bits" in other.stderr
    resumed = run("quantize", dense_folder, tmp_path / "out", "--recipe", "nf")
    assert resumed.exit_code == 0, resumed.output
    assert "resuming: 1 of 3 files are done" in resumed.stderr


def test_push_to_hub_uploads_the_finished_folder(dense_folder, tmp_path, monkeypatch):
    import huggingface_hub

    calls = []

    class Api:
        def create_repo(self, name, exist_ok):
            calls.append(("create", name))

        def upload_folder(self, folder_path, repo_id):
            calls.append(("upload", sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    result = run(
        "quantize", dense_folder, tmp_path / "out", "--recipe", "nf", "--push-to-hub", "me/model"
    )
    assert result.exit_code == 0, result.output
    assert calls[0] == ("create", "me/model")
    assert {"README.md", "config.json", "report.json"} <= set(calls[1][1])


def test_info(native_folder):
    result = run("info", native_folder, "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["format"] == "flute_vllm"
    assert summary["format_version"] == 1
    assert summary["bits"] == {"3": 2, "4": 12}
    assert summary["bytes"] == Checkpoint(native_folder).nbytes
    assert 3 < summary["bits_per_weight"]["codes"] < 4 < summary["bits_per_weight"]["linears"] + 1
    # 4 heads, o_proj in_features 256 and down_proj in_features 512 in groups of 64
    assert summary["tensor_parallel_sizes"] == [1, 2, 4]
    assert "tensors" not in summary
    listed = json.loads(run("info", native_folder, "--json", "--tensors").stdout)["tensors"]
    assert len(listed) == len(Checkpoint(native_folder).tensors)
    table = run("info", native_folder, "--tensors").stdout
    assert "2 x 3 bit, 12 x 4 bit" in table


def test_info_of_other_formats(dense_folder):
    dense = json.loads(run("info", dense_folder, "--json").stdout)
    assert (dense["format"], dense["bits"]) == ("dense", {})
    assert dense["bits_per_weight"]["linears"] == 16
    zoo = json.loads(run("info", ZOO, "--json").stdout)
    assert (zoo["format"], zoo["bits"]) == ("flute_zoo", {"4": 14})


def test_dequantize_and_convert(native_folder, tmp_path):
    for command, source in (("dequantize", native_folder), ("convert", ZOO)):
        result = run(command, source, tmp_path / command)
        assert result.exit_code == 0, result.output
        assert "wrote" in result.stdout
        Checkpoint(tmp_path / command)


def test_failure_is_a_message_and_exit_code_1(native_folder, dense_folder, tmp_path):
    for arguments in (
        ("quantize", native_folder, tmp_path / "out"),
        ("quantize", dense_folder, native_folder),
        ("quantize", dense_folder, tmp_path / "out", "--skip", "re:("),
        ("dequantize", dense_folder, tmp_path / "out"),
        ("convert", native_folder, tmp_path / "out"),
        ("info", tmp_path / "nowhere"),
        ("eval", native_folder, tmp_path / "nowhere.txt"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1, (arguments, result.output)
        assert result.stderr.startswith("flute: ")
        assert all(f"  {part}: " in result.stderr for part in ("where", "why", "fix"))
        assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ("quantize", "a"),
        ("quantize", "a", "b", "--bits", "5"),
        ("quantize", "a", "b", "--bits", "four"),
        ("quantize", "a", "b", "--group-size", "48"),
        ("quantize", "a", "b", "--scale-dtype", "float64"),
        ("quantize", "a", "b", "--override", "down_proj"),
        ("quantize", "a", "b", "--override", "down_proj=5"),
        ("quantize", "a", "b", "--unknown"),
        ("compress", "a"),
        ("eval", "a"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments):
    assert run(*arguments).exit_code == 2


def test_eval(native_folder, tmp_path, monkeypatch):
    """The command's own part: what it passes on and prints. The numbers are evaluate.py's."""
    from flute_vllm import evaluate

    (tmp_path / "text.txt").write_text("some text")
    result = evaluate.PerplexityResult(1.0, 9, 2.71828, "protocol", 0.25, 0.5)
    seen = {}

    def score(model, tokenizer, texts, **options):
        seen.update(options, model=model, texts=texts)
        return result

    monkeypatch.setattr(evaluate, "load_model", lambda folder, device: (folder, None))
    monkeypatch.setattr(evaluate, "perplexity", score)
    arguments = ("eval", native_folder, tmp_path / "text.txt", "--reference", native_folder)
    plain = run(*arguments)
    assert plain.exit_code == 0, plain.output
    assert "perplexity 2.7183 over 9 tokens" in plain.stdout
    assert "50.00%" in plain.stdout
    assert seen["texts"] == ["some text"]
    assert seen["reference"] == native_folder
    values = json.loads(run(*arguments, "--json").stdout)
    assert values["perplexity"] == 2.71828
    assert values["kl"] == 0.25


def test_interrupted_process(dense_folder, tmp_path):
    """Ctrl-C at work: exit code 130, no finished folder, and what to do next."""
    big = write_tiny_model(
        tmp_path / "dense", "llama", hidden_size=1024, intermediate_size=8192, head_dim=256
    )
    child = process("quantize", big, tmp_path / "out")
    deadline = time.monotonic() + 120
    while not (tmp_path / "out.partial").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=120)
    assert child.returncode == 130, stderr
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    assert "the same command goes on" in stderr
    assert not (tmp_path / "out").exists()


def test_process_end_to_end(dense_folder, tmp_path):
    child = process("quantize", dense_folder, tmp_path / "out", "--bits", "3")
    stdout, stderr = child.communicate(timeout=300)
    assert child.returncode == 0, stderr
    assert "3.2" in stdout
    again = process("quantize", dense_folder, tmp_path / "out")
    _, stderr = again.communicate(timeout=300)
    assert again.returncode == 1
    assert stderr.startswith("flute: output exists\n  where: ")
