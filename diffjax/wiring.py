"""Wiring: builds the parts of an experiment from its config, and checks that they fit together."""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffjax import choices, lookup
from diffjax.conditions import Condition, Rate
from diffjax.conditions.guided import at_scale, with_label
from diffjax.errors import UserError
from diffjax.kinds import complaint
from diffjax.models.layers import attention
from diffjax.models.layers.common import (
    HIDDEN,
    attention_layers,
    attention_off,
    blocks_off,
)
from diffjax.models.low_rank import LoraLayers
from diffjax.objectives.base import Objective, Progress, Traits, conditioned_batch, own_params
from diffjax.optimizers.mup import rate_factors
from diffjax.process.paths import Pair, Path
from diffjax.process.precond import Apply, Meaning, Precond, Predict, denoiser, flow_map_predictor
from diffjax.process.targets import undecodable
from diffjax.sampling.guidance import GuidanceModels, mixes
from diffjax.sampling.sample import Recipe
from diffjax.sampling.solvers import Solver
from diffjax.spec import build


class Wired(NamedTuple):
    """The parts of one experiment, built from its config.

    Attributes:
        path: the path from data to noise.
        precond: the network's target, input scale and noise label.
        objective: the training objective.
        network: the Flax module.
        apply: the network as a function of parameters and inputs.
        recipe: the sampling recipe of the run's own samples.
        image_shape: `(H, W, C)` of the data.
        condition: the kind of condition of its samples.
        condition_dropout: the probability with which training replaces a condition by the null
            condition; of several parts perhaps a dict of probabilities by part.
        params_shape: the shapes of the parameters, a tree of `ShapeDtypeStruct`.
        lora: the layers of the network that have changes of low rank; most often none.
        trainable: patterns of the parameters that are trained (`diffjax.training.subset`); "" is
            all.
    """

    path: Path
    precond: Precond
    objective: Objective
    network: nn.Module
    apply: Apply
    recipe: Recipe
    image_shape: tuple[int, int, int]
    condition: Condition
    condition_dropout: Rate
    params_shape: Any
    lora: LoraLayers = LoraLayers()
    trainable: str = ""

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.image_shape))
        return (
            f"Wired({type(self.network).__name__} of {self.num_params:,} parameters, "
            f"{type(self.objective).__name__} on {self.path!r}, {shape}, "
            f"{self.condition.describe()})"
        )

    def init(self, key: Array) -> Any:
        """Initial parameters, of the network and of the objective."""
        return self._init_of(self.network)(key)

    def _init_of(
        self, network: nn.Module, embedded: bool | None = None
    ) -> Callable[[Array], dict[str, Any]]:
        given = (network, self.objective, self.image_shape, self.condition, self.lora)
        return partial(_init, *given, embedded=embedded)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """`(H, W, C)` of the network's input."""
        return _input_shape(self.objective, self.image_shape)

    def predict(
        self, params: Any, source: Array | None = None, scale: Array | None = None
    ) -> Predict:
        """The denoiser with given parameters, `(x, t, cond) -> (x0, eps)`.

        Args:
            params: live or averaged parameters.
            source: the source images `[B, …]` of objectives that need them.
            scale: of guidance, `[]`, for a network that has it as an input; None is 1.

        Returns:
            A denoiser, or the flow map if the objective trains one.
        """
        model = (self.apply, params, self.path, self.objective.precond_for(source))
        traits = self.objective.traits
        if traits.meaning is Meaning.AVERAGE_VELOCITY:
            predict = flow_map_predictor(*model)
        else:
            predict = denoiser(*model, learned_variance=traits.learned_variance)
        if traits.scales is None:
            return predict
        return at_scale(predict, 1.0 if scale is None else scale)

    def models(
        self,
        params: Any,
        source: Array | None,
        weaker: Predict | None,
        other: Any = None,
        scale: Array | None = None,
    ) -> GuidanceModels:
        """The model and its variants, for guidance.

        Args:
            params: live or averaged parameters.
            source: the source images `[B, …]` of objectives that need them.
            weaker: the model of autoguidance, if there is one.
            other: one row of the condition that guidance leads away from, if there is one.
            scale: of guidance, where it is an input of the network.
        """
        predict = self.predict(params, source, scale)

        def within(context: Callable[[str], Any]) -> Callable[[str], Predict]:
            def without(names: str) -> Predict:
                def perturbed(x: Array, t: Array, cond: Any) -> Pair:
                    with context(names):
                        return predict(x, t, cond)

                return perturbed

            return without

        return GuidanceModels(
            predict, self.condition, weaker, within(attention_off), within(blocks_off), other
        )

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of a training batch, as `ShapeDtypeStruct`s."""
        images = jax.ShapeDtypeStruct((batch_size, *self.image_shape), jnp.float32)
        batch = {"image": images, **self.condition.shapes(batch_size)}
        traits = self.objective.traits
        if traits.features:
            shape = (batch_size, *traits.features)
            batch["features"] = jax.ShapeDtypeStruct(shape, jnp.float32)
        return {**batch, "source": images} if traits.needs_source else batch

    @property
    def rate_factors(self) -> Any:
        """muP's factor of the learning rate for each parameter; None without muP.

        Raises:
            UserError: there is no network of the base width.
        """
        base = getattr(self.network, "base", None)
        if base is None:
            return None
        shapes = jax.eval_shape(self._init_of(base), _key())
        return rate_factors(self.params_shape, shapes)

    @property
    def own_names(self) -> tuple[str, ...]:
        """Names, at the top of the tree, of the parameters that the objective adds."""
        return tuple(jax.eval_shape(lambda key: own_params(self.objective, key, ()), _key()))

    @property
    def embedding_names(self) -> tuple[str, ...]:
        """The paths of the parameters that embed a scale of guidance, if that is an input."""
        if self.objective.traits.scales is None:
            return ()
        init = self._init_of(self.network, embedded=False)
        without = flatten_dict(jax.eval_shape(init, _key()), sep="/")
        return tuple(n for n in flatten_dict(self.params_shape, sep="/") if n not in without)

    @property
    def num_params(self) -> int:
        """The number of trained parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params_shape))


def wire(
    config: ConfigDict,
    image_shape: tuple[int, int, int],
    condition: Condition,
    mesh: Mesh | None = None,
) -> Wired:
    """Builds all parts of a config; nothing is compiled, and `check_wired` checks that they fit.

    Args:
        config: the config of an experiment.
        image_shape: `(H, W, C)` of the data.
        condition: the kind of condition that the data have.
        mesh: the devices, which decide how attention is computed where the config has "auto"; by
            default it is those on which the network is evaluated.

    Raises:
        UserError: a name is unknown, a value is out of its range, or a size does not divide.
    """
    objective = build_objective(config)
    path, precond = objective.path, objective.precond
    runtime = {**condition.network_arguments(), **_outputs(objective, image_shape)}
    runtime |= _hidden(objective, config)
    if mesh is not None:
        runtime |= _attention(config, mesh, objective.traits.forward_mode)
    network = build(config.model, nn.Module, "config.model", **runtime)
    recipe = build(config.sampling, Recipe, "config.sampling")

    def apply(
        params: Any,
        x: Array,
        noise_label: Array,
        cond: Any,
        *,
        key: Array | None = None,
        hidden: bool = False,
    ) -> Any:
        rngs = None if key is None else {"dropout": key}
        how: Any = {"train": key is not None, "rngs": rngs}
        noise_label, cond = with_label(noise_label, cond)
        if cond is None:
            cond = condition.null(x.shape[0])
        inputs = ({"params": params}, x, noise_label, cond)
        with lora.on(train=key is not None):
            if not hidden:
                return network.apply(*inputs, **how)
            collection, name = HIDDEN
            output, sown = network.apply(*inputs, **how, mutable=[collection])
        if name not in sown.get(collection, {}):
            raise UserError(
                f"{type(objective).__name__} compares features inside the network, and "
                f"{type(network).__name__} sows none (diffjax.models.layers.common.HIDDEN)"
            )
        return output, sown[collection][name]

    def shapes(lora: LoraLayers) -> dict[str, Any]:
        return jax.eval_shape(
            partial(_init, network, objective, image_shape, condition, lora), _key()
        )

    lora = build(config.lora, LoraLayers, "config.lora")
    params = shapes(lora)
    lora.check(params, shapes)
    return Wired(
        path=path,
        precond=precond,
        objective=objective,
        network=network,
        apply=apply,
        recipe=recipe,
        image_shape=image_shape,
        condition=condition,
        condition_dropout=dropout_of(config),
        params_shape=params,
        lora=lora,
        trainable=lora.trainable(config.trainable),
    )


def check_wired(wired: Wired, batch_size: int, num_steps: int) -> None:
    """Checks that the parts of a config fit together, for training and for its own recipe.

    Nothing is compiled or trained: shapes are checked by abstract evaluation.

    Args:
        wired: the parts.
        batch_size: images a step.
        num_steps: the number of steps of the training.

    Raises:
        UserError: the target can't be decoded on the path, dropout is of parts that the condition
            does not have, sampling does not suit the model, or the loss does not suit the batch.
    """
    check_target(wired.path, wired.precond)
    wired.condition.check_dropout(wired.condition_dropout)
    check_recipe(wired.recipe, wired)
    _check_loss(wired, batch_size, num_steps)


def dropout_of(config: ConfigDict) -> Rate:
    """`config.condition_dropout`: a number, or a dict of numbers by part of the condition.

    Example:
        >>> dropout_of(ConfigDict({"condition_dropout": {"text": 0.1}}))
        {'text': 0.1}
    """
    rate = config.condition_dropout
    return rate.to_dict() if isinstance(rate, ConfigDict) else rate


def build_objective(config: ConfigDict) -> Objective:
    """Builds the objective of a config, with its path, preconditioning and wrappers.

    Raises:
        UserError: a value is out of its range, or wrappers can't be combined.

    Example:
        >>> config = ConfigDict({"name": "toy"})
        >>> names = lookup.set_axes(
        ...     config, "objective=flow", {"none": ConfigDict()}, model="none"
        ... )
        >>> build_objective(config).path
        Linear(t_min=0.001, t_noise=1.0)
    """
    path = build(config.path, Path, "config.path")
    return _on(config, path, build(config.precond, Precond, "config.precond"))


def traits_of(config: ConfigDict) -> Traits:
    """What the objective of a config is, before its path and target are settled.

    Raises:
        UserError: a value is out of its range, or wrappers can't be combined.

    Example:
        >>> config = ConfigDict({"name": "toy"})
        >>> names = lookup.set_axes(
        ...     config, "objective=mean_flow", {"none": ConfigDict()}, model="none"
        ... )
        >>> traits_of(config).solver
        'flow_map'
    """
    return _on(config, None, None).traits


def _on(config: ConfigDict, path: Path | None, precond: Precond | None) -> Objective:
    objective = build(config.objective, Objective, "config.objective", path=path, precond=precond)
    # Configs that are older than wrappers have no list of them.
    for i, wrapper in enumerate(config.get("wrappers", ())):
        inner, name = objective, f"config.wrappers[{i}]"
        objective = build(wrapper, Objective, name, objective=inner)
        declared = get_type_hints(type(objective)).get("objective", Any)
        if isinstance(declared, type) and not isinstance(inner, declared):
            raise UserError(
                f"{type(objective).__name__} goes around a {declared.__name__} alone, not around "
                f"{type(inner).__name__}: leave one of them out"
            )
    return objective


def check_target(path: Path, precond: Precond) -> None:
    """Checks that the target can be decoded on the path.

    Raises:
        UserError: it can't; the message has the targets that can.
    """
    reason = undecodable(path, precond.target)
    if reason:
        legal = [
            name
            for name, target in choices.TARGETS.items()
            if undecodable(path, build(target)) is None
        ]
        path_name = type(path).__name__
        raise UserError(
            f"target {type(precond.target).__name__} can't be used on path {path_name}: {reason}; "
            f"use --config.path.t_noise={0.999 * float(path.t_noise):.4g} "
            f"or a target of {', '.join(legal)}"
        )


def check_recipe(recipe: Recipe, wired: Wired) -> None:
    """Checks that a model can be sampled with a recipe.

    Raises:
        UserError: a number is out of its range; the grid is not finite on the path; the solver adds
            fresh noise and the model's noise is not independent, or it needs a variance or another
            kind of prediction than the network's; or guidance does not fit model or solver. The
            message has the reason and what to use instead.
    """
    for field in fields(recipe):
        wrong = complaint(field.name, getattr(recipe, field.name), field.type)
        if wrong:
            raise UserError(wrong)
    if not np.isfinite(recipe.times(wired.path)).all():
        raise UserError(f"{recipe.grid} has times that are not finite on {wired.path}")
    check_guidance(recipe, wired)
    solver, traits, name = recipe.solver, wired.objective.traits, type(wired.objective).__name__
    if not traits.meaning.serves(solver.needs):
        raise UserError(
            f"this solver needs a model of {solver.needs}, and {name} trains one of "
            f"{traits.meaning}: take the solver {traits.solver}, or train another loss"
        )
    if solver.fresh_noise and not traits.independent_noise:
        raise UserError(
            f"{name} was trained on images paired with their noise, or "
            "with noise in between: a solver that adds fresh noise does not suit it; take one of "
            f"{_solvers_that(lambda o: traits.meaning.serves(o.needs) and not o.fresh_noise)}"
        )
    if solver.learned_variance and not traits.learned_variance:
        raise UserError(
            f"this solver takes the variance that a network predicts, and {name} trains none: take "
            "the solver ddpm, or train with wrappers=learned_variance"
        )


def check_guidance(recipe: Recipe, wired: Wired) -> None:
    """Checks that guidance fits the model and the solver.

    Raises:
        UserError: predictions are not posterior means; guidance needs a null condition, another
            condition or an attention layer that the network does not have, or a solver that puts
            the predicted noise back.
    """
    scale, against = recipe.guidance_scale, recipe.against
    scales, name = wired.objective.traits.scales, type(wired.objective).__name__
    if against.embedded and scales is None:
        raise UserError(
            f"against={type(against).__name__}: {name} trains no network that has the scale of "
            "guidance as an input: train with wrappers=embedded_guidance, or take against=null"
        )
    if scale == 1.0 or against.embedded:
        return
    if not wired.objective.traits.meaning.serves(Meaning.POSTERIOR_MEAN):
        raise UserError(
            f"guidance_scale={scale:g} combines posterior means, and "
            f"{name} trains a model of {wired.objective.traits.meaning}: "
            f"use {'against=embedded' if scales else 'guidance_scale=1'}"
        )
    rate = wired.condition_dropout
    # Other weights are of another model, perhaps, which `Model.weaker` checks.
    needs_null = against.needs_null and not against.weights
    if needs_null and not wired.condition.null_is_trained(rate):
        why = "has no condition"
        if wired.condition.can_be_dropped:
            written = (
                f"{rate}, which never drops all parts" if isinstance(rate, dict) else f"{rate:g}"
            )
            why = f"is trained with condition_dropout={written}"
        raise UserError(
            f"guidance_scale={scale:g} needs a null condition, but this network {why}; use "
            "guidance_scale=1, or guide against=weights:RUN or against=classifier:FILE"
        )
    reason = against.unfit(wired.condition, attention_layers(wired.params_shape))
    if reason:
        raise UserError(f"guidance against {type(against).__name__}: {reason}")
    if not recipe.solver.renoises and not mixes(recipe.guidance):
        raise UserError(
            f"{type(recipe.guidance).__name__} returns x0 and noise that do not mix to x, which "
            "makes sense to solvers alone that put the noise back: take one of "
            f"{_solvers_that(lambda other: other.renoises)}"
        )


def _solvers_that(suit: Callable[[Solver], bool]) -> str:
    return ", ".join(name for name in choices.SOLVERS if suit(lookup.solver_called(name)))


def _init(
    network: nn.Module,
    objective: Objective,
    image_shape: tuple[int, ...],
    condition: Condition,
    lora: LoraLayers,
    key: Array,
    embedded: bool | None = None,
) -> dict[str, Any]:
    """The network's initial parameters, and the objective's under their own names.

    Whether the network has a scale of guidance as a further label is known to the objective.
    """
    embedded = objective.traits.scales is not None if embedded is None else embedded
    two_times = objective.traits.meaning is Meaning.AVERAGE_VELOCITY
    labels = 1 + two_times + embedded
    noise_label = jnp.zeros((1, labels) if labels > 1 else 1)
    x = jnp.zeros((1, *_input_shape(objective, image_shape)))
    with lora.on():
        collection, name = HIDDEN
        found: Any = network.init(
            key, x, noise_label, condition.example(1), mutable=("params", collection)
        )
    params, sown = found["params"], found.get(collection, {}).get(name)
    width = sown[0].shape[-1] if sown else 1
    return {**params, **own_params(objective, jax.random.fold_in(key, 1), params, width)}


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def _outputs(objective: Objective, image_shape: tuple[int, ...]) -> dict[str, int]:
    """The network's argument `out_channels`; none if input and output have the image's channels."""
    traits = objective.traits
    if traits.outputs == traits.inputs == 1:
        return {}
    return {"out_channels": traits.outputs * image_shape[-1]}


def _hidden(objective: Objective, config: ConfigDict) -> dict[str, tuple[int, ...]]:
    """The network's argument `hidden_depths`; none where the loss takes no tokens after a block.

    Raises:
        UserError: the network has no such tokens.
    """
    traits = objective.traits
    if traits.features is None and not traits.hidden_depths:
        return {}
    if not isinstance(config.model, ConfigDict) or "hidden_depths" not in config.model:
        name = str(getattr(config.model, "_target_", config.model)).rpartition(":")[2]
        raise UserError(
            f"{type(objective).__name__} takes the tokens after a block of a transformer, and "
            f"{name} has none: take model=dit or one of its kind, or leave that loss out"
        )
    return {"hidden_depths": traits.hidden_depths or tuple(config.model.hidden_depths)}


def _attention(config: ConfigDict, mesh: Mesh, forward_mode: bool) -> dict[str, str]:
    """The network's argument `attention` on a mesh; none for a network without that choice.

    It is the mesh that decides, not the machine: a program may be compiled elsewhere than it runs.
    """
    if not isinstance(config.model, ConfigDict) or "attention" not in config.model:
        return {}
    platform, dtype = mesh.devices.flat[0].platform, config.model.get("dtype", "float32")
    named, tokens = config.model.attention, mesh.shape["sequence"]
    return {"attention": attention.resolve(named, platform, dtype, tokens, forward_mode)}


def _input_shape(objective: Objective, image_shape: tuple[int, ...]) -> tuple[int, int, int]:
    height, width, channels = image_shape
    return height, width, objective.traits.inputs * channels


def _check_loss(wired: Wired, batch_size: int, num_steps: int) -> None:
    """Traces the loss once, so that shapes that do not fit fail here and not in the first step."""
    params = wired.params_shape
    memory, batch = wired.objective.init_memory(), wired.batch_shapes(batch_size)
    progress = Progress(jnp.zeros((), jnp.int32), memory, num_steps)
    loss, _ = jax.eval_shape(
        lambda params, key, batch: wired.objective(
            wired.apply, params, params, key, conditioned_batch(batch, wired.condition), progress
        ),
        params,
        _key(),
        batch,
    )
    if loss.shape != (batch_size,):
        raise UserError(
            f"the objective returns a loss of shape {loss.shape} for {batch_size} example(s), not "
            f"({batch_size},)"
        )
