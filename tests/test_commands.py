"""Every command once, in this process, on a small workdir: the quick look; each has a file of its own with the rest."""

import json
from pathlib import Path

import gradio
import gradio_client
import jax
import numpy as np
import pytest
from PIL import Image

import simam_jax
from simam_jax import convert, demo, export, predict, summary, visualize
from simam_jax.inference import Predictor


def test_convert_writes_a_state_dict_and_reads_it_back(workdir, tmp_path, capsys):
    weights, copy = str(tmp_path / "weights.npz"), str(tmp_path / "copy")
    convert.main([str(workdir), weights, "--to-torch"])
    convert.main([weights, copy, "--model", "cifar_resnet20"])
    assert capsys.readouterr().out == f"Wrote {weights}\nWrote {copy}\n"
    (_, before), (_, after) = simam_jax.load(workdir), simam_jax.load(copy)
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_summary_counts_parameters(capsys):
    summary.main(["--model", "cifar_resnet20"])
    assert "0.27 M parameters" in capsys.readouterr().out


def test_predict_prints_a_table_and_json(workdir, photographs, capsys):
    command = ["--checkpoint", str(workdir), "--top", "2", *photographs]
    assert predict.main(command) == 0
    table = capsys.readouterr().out.splitlines()
    assert predict.main([*command, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in rows] == photographs
    expected = Predictor.load(workdir)(photographs).top(2)
    assert [[entry["class"] for entry in row["top"]] for row in rows] == [[n for n, _ in best] for best in expected]
    assert [line for line in table if "%" not in line] == photographs
    assert [line.split(" %  ")[1] for line in table if "%" in line] == [n for best in expected for n, _ in best]


@pytest.mark.parametrize("command", ["attention", "grad-cam", "curves"])
def test_visualize_draws(command, workdir, photographs, tmp_path, capsys):
    picture = tmp_path / "picture.png"
    what = [str(workdir)] if command == "curves" else ["--checkpoint", str(workdir), photographs[0]]
    assert visualize.main([command, *what, "--output", str(picture)]) == 0
    assert capsys.readouterr().out == f"Wrote {picture}\n"
    with Image.open(picture) as image:
        assert len(np.unique(image.convert("RGB"))) > 100


def test_export_writes_a_network_that_runs(workdir, tmp_path, capsys):
    export.main(["--checkpoint", str(workdir), "--format", "stablehlo", str(tmp_path / "network")])
    assert "its logits differ by at most" in capsys.readouterr().out
    exported = jax.export.deserialize(bytearray((tmp_path / "network").read_bytes()))
    assert exported.out_avals[0].shape[1:] == (7,)


def test_demo_answers_an_image(workdir, photographs, monkeypatch):
    answers = []

    def one_visit(blocks):
        client = gradio_client.Client(blocks.local_url, verbose=False, analytics_enabled=False)
        answers.append(client.predict(gradio_client.handle_file(photographs[0]), api_name="/classify"))
        blocks.close(verbose=False)

    monkeypatch.setattr(gradio.Blocks, "block_thread", one_visit)
    demo.main(["--checkpoint", str(workdir)])
    (expected,) = Predictor.load(workdir)(photographs[0]).top(5)
    ((top, *pictures),) = answers
    assert [entry["label"] for entry in top["confidences"]] == [name for name, _ in expected]
    assert all(Path(picture).is_file() for picture in pictures)
