"""The integers that a release holds of its index and context models -> the models, or what is wrong with them."""

import torch
from torch import Tensor

from models.context_model import GROUPS, TABLES, TABLES_SHAPE, ContextModel, ContextNetwork
from models.entropy_coding import TOTAL
from models.index_model import IndexModel, IndexNetwork
from models.integers import IntegerNetwork
from models.residual_hyperprior import ResidualHyperprior
from utils import checkpoints
from utils.errors import CheckpointError


def index_model_of(state: dict[str, Tensor], codes: int, place: str) -> IndexModel:
    """The index model of its integers, as a release holds them; `place` names them in errors.

    Raises:
        CheckpointError: names keys, shapes and types that are not those of a model of so many codes.
    """
    _require_tensors(state, place)
    network = IndexNetwork(codes, *IndexNetwork.sizes(state))
    _fill_integers(network, state, place)
    return IndexModel(network)


def context_model_of(state: dict[str, Tensor], residual: ResidualHyperprior, place: str) -> ContextModel:
    """The context model of its integers and tables, for a residual codec that has its tables. Errors as `index_model_of`."""
    _require_tensors(state, place)
    network = ContextNetwork(residual.params.channels, *ContextNetwork.width_of(state))
    _fill_integers(network, {key: value for key, value in state.items() if key != TABLES}, place)
    tables = state.get(TABLES)
    whole = tables is not None and tables.dtype == torch.int32 and tables.shape == TABLES_SHAPE
    if not whole or not (tables > 0).all() or not (tables.sum(-1) == TOTAL).all():
        raise CheckpointError(f"{place}: damaged, no tables of {TABLES_SHAPE} frequencies that sum to {TOTAL}")
    if not ((network.group >= 0) & (network.group < GROUPS)).all():
        raise CheckpointError(f"{place}: damaged, groups of channels beyond 0 to {GROUPS - 1}")
    return ContextModel(network, tables.numpy(), residual.tables.reach("symbols"))


def _require_tensors(state: dict[str, Tensor], place: str) -> None:
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{place}: damaged, it holds more or other than tensors by name")


def _fill_integers(network: IntegerNetwork, state: dict[str, Tensor], place: str) -> None:
    """Load a network's integers, strictly. Raises CheckpointError: names keys, shapes and types that are not its own."""
    checkpoints.load_strictly(network, network.natural(state), place)
    kinds = {key: value.dtype for key, value in network.integers().items()}
    if other := [f"{key} {value.dtype} for {kinds[key]}" for key, value in state.items() if value.dtype != kinds[key]]:
        raise CheckpointError(f"{place}: damaged. other type: {checkpoints.first_of(other)}")
