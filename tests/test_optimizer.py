"""The optimizer is PyTorch's SGD; the schedules change where the recipes say."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from configs import base, cifar10_resnet20_simam, mobilenet_v2_simam, resnet50_simam
from simam_jax import UserError
from simam_jax.training.optimizer import learning_rate, sgd, steps_in

IMAGENET = 1_281_167


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_pytorch_s(momentum, nesterov):
    if nesterov and not momentum:
        nesterov = False  # PyTorch refuses it
    config = base.get_config().optimizer
    config.update(momentum=momentum, nesterov=nesterov, weight_decay=0.01)
    rates = [0.1, 0.1, 0.01]
    rng = np.random.default_rng(0)
    start = rng.standard_normal((3, 2))

    theirs = torch.tensor(start, requires_grad=True)
    reference = torch.optim.SGD([theirs], lr=rates[0], momentum=momentum, nesterov=nesterov, weight_decay=0.01)
    optimizer = sgd(config, lambda step: jnp.array(rates)[step])
    ours = {"kernel": jnp.asarray(start)}
    state = optimizer.init(ours)
    for rate in rates:
        gradient = rng.standard_normal((3, 2))
        reference.param_groups[0]["lr"] = rate
        theirs.grad = torch.tensor(gradient)
        reference.step()
        updates, state = optimizer.update({"kernel": jnp.asarray(gradient)}, state, ours)
        ours = optax.apply_updates(ours, updates)
        np.testing.assert_allclose(ours["kernel"], theirs.detach().numpy(), rtol=1e-14)


@pytest.mark.parametrize("everything", [True, False])
def test_weight_decay_spares_batch_norm_and_biases_on_request(everything):
    config = base.get_config().optimizer
    config.update(decay_bn_and_bias=everything, weight_decay=0.5)
    params = {"conv": {"kernel": jnp.ones((1, 1, 2, 2))}, "bn": {"scale": jnp.ones(2)}, "fc": {"bias": jnp.ones(2)}}
    optimizer = sgd(config, lambda _: 1.0)
    zeros = {"conv": {"kernel": jnp.zeros((1, 1, 2, 2))}, "bn": {"scale": jnp.zeros(2)}, "fc": {"bias": jnp.zeros(2)}}
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert np.all(updates["conv"]["kernel"] == -0.5)
    spared = -0.5 if everything else 0.0
    assert np.all(updates["bn"]["scale"] == spared)
    assert np.all(updates["fc"]["bias"] == spared)


def test_gradients_are_clipped_before_the_decay():
    config = base.get_config().optimizer
    config.update(clip_global_norm=1.0, weight_decay=0.0, momentum=0.0)
    optimizer = sgd(config, lambda _: 1.0)
    params = {"kernel": jnp.zeros((2, 1))}
    updates, _ = optimizer.update({"kernel": jnp.array([[3.0], [4.0]])}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], [[-0.6], [-0.8]], rtol=1e-6)


def rates_at(config, epochs, *, num_examples, **changes):
    config.schedule.update(**changes)
    num_steps = steps_in(config.num_epochs, num_examples, config.batch_size)
    rate = learning_rate(config.schedule, num_examples=num_examples, batch_size=config.batch_size, num_steps=num_steps)
    return [float(rate(steps_in(epoch, num_examples, config.batch_size))) for epoch in epochs]


def test_the_step_schedule_of_imagenet():
    rates = rates_at(resnet50_simam.get_config(), [0, 29.99, 30, 60, 90, 99.9], num_examples=IMAGENET)
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.01, 0.001, 1e-4, 1e-4], rtol=1e-5)


def test_the_cosine_schedule_starts_at_the_peak_and_ends_at_zero():
    rates = rates_at(mobilenet_v2_simam.get_config(), [0, 75, 150], num_examples=IMAGENET)
    np.testing.assert_allclose(rates, [0.05, 0.025, 0.0], atol=1e-5)


def test_the_cifar_schedule_with_the_warm_up_of_deep_networks():
    config = cifar10_resnet20_simam.get_config("model=cifar_resnet110")
    rates = rates_at(config, [0, 0.99, 1.01, 81.01, 122.01], num_examples=50_000, warmup_epochs=1.0)
    np.testing.assert_allclose(rates, [0.01, 0.01, 0.1, 0.01, 0.001], rtol=1e-5)


def test_a_linear_warm_up_climbs_to_the_peak():
    config = mobilenet_v2_simam.get_config()
    rates = rates_at(config, [0, 2.5, 5, 5.1], num_examples=IMAGENET, warmup_epochs=5.0)
    assert rates[0] < 1e-4
    np.testing.assert_allclose(rates[1:], [0.025, 0.05, 0.05], rtol=1e-3)


def test_durations_are_whole_updates_and_cover_the_epochs():
    assert steps_in(1, IMAGENET, 256) == 5005
    assert steps_in(100, IMAGENET, 256) == 500_456
    assert steps_in(2, 128, 64) == 4


def test_an_unknown_schedule_names_the_nearest():
    config = base.get_config().schedule
    config.name = "cosin"
    with pytest.raises(UserError, match="Did you mean 'cosine'"):
        learning_rate(config, num_examples=10, batch_size=2, num_steps=5)
