"""Every number that the reference implementation printed, from the same weights (tests/golden): the networks are equal to it.

In float64 everything agrees to 1e-11 of its size (3e-12 is the most that was seen), and after some SGD steps, which amplify
rounding, to 1e-9 (6e-11). What is zero in theory (the gradient of a bias before a batch norm) is
rounding noise on both sides and must be below 1e-9.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from golden_cases import NAMES, golden_images, golden_state, model_name, read_case

from simam_jax.torch_weights.names import to_torch, torch_names
from simam_jax.torch_weights.variables import from_torch

QUICK = ("cifar-resnet20-basic-simam-0.0001",)  # the others take minutes: `pytest -m slow`
CASES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in NAMES]


def build(case: dict):
    """The network of a case, in float32."""
    model, variables = from_torch(
        golden_state(case["state_dict"]),
        model_name(case),
        attention=case["attention"],
        attention_param=case["attention_param"],
    )
    # The reference implementation's numbers of the wide networks are without dropout.
    return model.with_backbone(dropout_rate=0.0) if hasattr(model.backbone, "dropout_rate") else model, variables


def in_float64(model, variables):
    """The same network and weights, computing in float64; needs 64-bit mode."""
    return model.with_backbone(dtype=jnp.dtype("float64")), jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float64), variables
    )


def make_train(model):
    """(variables, images, labels) -> loss, logits, updated statistics and gradients, in one program."""

    def loss_fn(params, variables, x, labels):
        logits, updates = model.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, (logits, updates["batch_stats"])

    def train(variables, x, labels):
        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (logits, stats)), grads = gradient(variables["params"], variables, x, labels)
        return loss, logits, stats, grads

    return jax.jit(train)


def norms(tree: dict, name: str, attention: str) -> dict[str, float]:
    """The L2 norm of every array, by the reference implementation's names."""
    flat = flatten_dict(tree)
    return {
        key: float(np.linalg.norm(np.ravel(flat[path]))) for path, key in torch_names(flat, name, attention).items()
    }


def assert_close(actual, golden, what: str, within: float = 1e-11):
    """Within this part of the array's largest value, or 1e-9 where that is zero in theory."""
    largest = np.abs(golden).max()
    atol = within * largest if largest > 1e-9 else 1e-9
    np.testing.assert_allclose(actual, golden, rtol=0, atol=atol, err_msg=what)


@pytest.fixture(scope="module", params=CASES)
def reference(request):
    """A case: what was asked of the reference implementation, what it answered, and its network."""
    case, golden = read_case(request.param)
    return case, golden, *build(case)


def test_float64_equals_the_reference(reference):
    case, golden, *network = reference
    with jax.enable_x64(True):
        model, variables = in_float64(*network)
        x, labels = golden_images(case)[0], np.array(case["labels"])
        assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == case["params"]
        predict = jax.jit(partial(model.apply, train=False))
        assert_close(predict(variables, x), golden["eval_logits"], "eval logits")

        train = make_train(model)
        loss, logits, stats, grads = train(variables, x, labels)
        assert_close(logits, golden["train_logits"], "train logits")
        assert_close(loss, case["train_loss"], "loss")
        mapped = partial(norms, name=model_name(case), attention=case["attention"])
        for kind, ours, theirs in (
            ("gradient", mapped({"params": grads}), case["grad_l2"]),
            ("running statistic", mapped({"batch_stats": stats}), case["bn_after_one_train_forward_l2"]),
        ):
            assert ours.keys() == theirs.keys()
            for key in theirs:
                assert_close(ours[key], theirs[key], f"{kind} {key}")
        first = to_torch({"params": grads}, model_name(case), attention=case["attention"])[case["grad_first_key"]]
        assert_close(first, golden["grad_first"], "first gradient")

        if "sgd_losses" in case:
            losses, variables = sgd(train, variables, case)
            np.testing.assert_allclose(losses, case["sgd_losses"], rtol=1e-9)
            assert_close(predict(variables, x), golden["eval_logits_after_sgd"], "eval logits after SGD", within=1e-9)


def sgd(train, variables, case):
    """The losses of the case's SGD steps and the variables after them."""
    rate, momentum, decay = (case["sgd"][name] for name in ("lr", "momentum", "weight_decay"))
    params, losses = jax.device_get(variables["params"]), []
    velocity = jax.tree.map(np.zeros_like, params)
    for step in range(len(case["sgd_losses"])):
        x, rng = golden_images(case, seed=500 + step)
        labels = rng.integers(0, case["num_classes"], case["batch"])
        loss, _, stats, grads = jax.device_get(train(variables, x, labels))
        velocity = jax.tree.map(lambda v, g, p: momentum * v + g + decay * p, velocity, grads, params)
        params = jax.tree.map(lambda p, v: p - rate * v, params, velocity)
        variables = {"params": params, "batch_stats": stats}
        losses.append(float(loss))
    return losses, variables


def test_float32_eval_logits_equal_the_reference(reference):
    case, golden, model, variables = reference
    logits = jax.jit(partial(model.apply, train=False))(variables, golden_images(case)[0])
    assert logits.dtype == jnp.float32
    error = np.abs(logits - golden["eval_logits"]).max() / np.abs(golden["eval_logits"]).max()
    assert error < 2e-5


def test_a_wrong_lambda_shows():
    """The comparison above is sharp: a lambda that is off by 1 % fails it."""
    case, golden = read_case("cifar-resnet20-basic-simam-0.0001")
    with jax.enable_x64(True):
        model, variables = in_float64(*build(case | {"attention_param": 1.01e-4}))
        logits = jax.jit(model.apply)(variables, golden_images(case)[0])
        with pytest.raises(AssertionError):
            assert_close(logits, golden["eval_logits"], "eval logits")
