"""Decoders as other models have them give the same logits and gradients on a mesh that splits their parameters."""

import dataclasses

import jax
import numpy as np
import pytest
from small import BLOCKS, QUICK, inputs, random_parameters

from retro_jax.config import MeshConfig
from retro_jax.parallel import rules
from retro_jax.parallel.mesh import create_mesh
from retro_jax.training.state import plan_model


@pytest.mark.parametrize("name", ["llama", "gpt-2"])
def test_logits_and_gradients_do_not_depend_on_the_mesh(name):
    config = dataclasses.replace(BLOCKS[name], cca_layers=(), num_heads=4, num_layers=1)
    params = random_parameters(config)
    tokens, _ = inputs(config, batch=4, length=8)
    tokens[1, :3] = config.pad_id
    results = []
    for mesh in (MeshConfig(), MeshConfig(data=1, fsdp=2, tensor=2, context=2)):
        devices = create_mesh(mesh, jax.devices()[: 1 if mesh.tensor == 1 else 8])
        plan = plan_model(config, devices)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, plan.params)

        def loss(params, tokens, plan=plan, devices=devices):
            with rules.use(devices):
                logits = plan.merge(params)(tokens)
                return (logits * np.cos(np.arange(config.vocab_size))).mean(), logits

        run = jax.jit(
            jax.value_and_grad(loss, has_aux=True),
            in_shardings=(shardings, rules.batch_sharding(devices)),
            compiler_options=QUICK,
        )
        (_, logits), gradients = run(jax.device_put(params, shardings), tokens)
        results.append((np.asarray(logits), jax.tree.map(np.asarray, gradients)))
        if mesh.tensor == 2:
            split = {part for leaf in jax.tree.leaves(shardings) for part in jax.tree.leaves(tuple(leaf.spec)) if part}
            assert split == {"fsdp", "tensor"}
    np.testing.assert_allclose(results[0][0], results[1][0], atol=1e-9)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-9), results[0][1], results[1][1])
