"""The cost of a network is traced from it, and equals what the reference implementation's README and the golden files say."""

import pytest
from golden_cases import NAMES, model_name, read_case

from simam_jax import UserError, create_model
from simam_jax.summary import main, summarize

# The reference implementation's README: millions of parameters, billions of FLOPs at 224 x 224.
README = {
    "resnet18": (11.69, 1.82),
    "resnet34": (21.80, 3.67),
    "resnet50": (25.56, 4.11),
    "resnet101": (44.55, 7.83),
    "resnext50_32x4d": (25.03, 4.26),
    "mobilenet_v2": (3.50, 0.31),
}


@pytest.mark.parametrize("name", README)
def test_parameters_and_flops_are_those_of_the_published_table(name: str):
    summary = summarize(create_model(name, num_classes=1000, attention="simam"))
    assert (round(summary.params / 1e6, 2), round(summary.flops / 1e9, 2)) == README[name]


@pytest.mark.parametrize("name", NAMES)
def test_counts_equal_the_golden_ones(name: str):
    case, _ = read_case(name)
    model = create_model(
        model_name(case),
        num_classes=case["num_classes"],
        attention=case["attention"],
        attention_param=case["attention_param"],
    )
    summary = summarize(model, case["flops_image_size"])
    assert summary.params == case["params"]
    assert summary.macs == case["macs_conv_linear"]
    assert summary.bn_elements == case["bn_elements"]
    assert summary.flops == case["flops_as_in_readme_table"]


def test_command_prints_stages_and_totals(capsys: pytest.CaptureFixture):
    main(["--model", "resnet50", "--image-size", "224"])
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[1:8]] == [
        "stem", "layer1", "layer2", "layer3", "layer4", "head", "total",
    ]  # fmt: skip
    assert "25.56 M parameters, 4.11 G FLOPs" in printed


def test_unknown_model_names_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'resnet50'"):
        main(["--model", "resnet5O"])
