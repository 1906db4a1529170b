"""The cache of CUDA graphs: what it records, replays and forgets, by a recorder that needs no GPU."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from models.index_model import IndexModel, IndexNetwork
from models.layers import fused_norm
from models.layers.sharing import sharing
from models.speed import graphs
from models.speed.choices import CUDA_PATHS
from models.speed.fast import prepare
from models.speed.graphs import GRAPHED, Graphed, Recorder, leave_graphs, use_graphs
from tests.residual import new_codec, picture


class Fixed(Recorder):
    """Replays on the CPU as a graph does: from memory of its own, into memory of its own, with the weights of then."""

    def __init__(self, broken: bool = False):
        super().__init__()
        self.recorded, self.replayed, self.broken = [], 0, broken

    def fits(self, inputs):
        return torch.is_inference_mode_enabled()

    def record(self, work, inputs):
        if self.broken:
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        self.recorded.append([tuple(part.shape) for part in inputs])
        fixed = [part.clone() for part in inputs]

        def replay(*inputs):
            self.replayed += 1
            for own, given in zip(fixed, inputs, strict=True):
                own.copy_(given)
            with _disable_current_modes():  # what counts operations does not see those of a graph
                return work(*fixed).clone()

        return replay


class Twice(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([2.0]))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.weight * x


def test_the_second_call_of_a_size_records_and_later_ones_replay():
    network, recorder = Twice(), Fixed()
    ours = Graphed(network.forward, network, recorder)
    with torch.inference_mode():
        for number in range(4):
            x = torch.full((3,), float(number))
            assert ours(x).tolist() == [2.0 * number] * 3
            assert (len(recorder.recorded), recorder.replayed) == [(0, 0), (1, 1), (1, 2), (1, 3)][number]
        first, second = ours(torch.ones(3)), ours(torch.zeros(3))
        assert first.tolist() == [2.0] * 3 and second.tolist() == [0.0] * 3  # results are the caller's own
    replayed = recorder.replayed
    ours(torch.ones(3)).sum().backward()  # with gradients, the function itself
    assert network.weight.grad.item() == 3 and recorder.replayed == replayed


def test_tiles_are_neither_recorded_nor_replayed():
    """Their layers take what was found in one picture; in a graph the next picture would get it."""
    network, recorder = Twice(), Fixed()
    ours = Graphed(network.forward, network, recorder)
    with torch.inference_mode():
        with sharing():
            ours(torch.ones(3)), ours(torch.ones(3))
        assert network.calls == 2 and not recorder.recorded
        ours(torch.ones(3)), ours(torch.ones(3))
        assert recorder.replayed == 1
        with sharing():
            ours(torch.ones(3))
        assert recorder.replayed == 1


def test_few_sizes_are_kept():
    network, recorder = Twice(), Fixed()
    ours = Graphed(network.forward, network, recorder)
    with torch.inference_mode():
        for size in range(1, graphs.SIZES + 2):
            ours(torch.ones(size)), ours(torch.ones(size))
        assert len(ours.graphs) == graphs.SIZES
        ours(torch.ones(graphs.SIZES + 1))
        assert len(recorder.recorded) == graphs.SIZES + 1
        ours(torch.ones(1))  # forgotten, though seen before: recorded at once
        assert len(recorder.recorded) == graphs.SIZES + 2


def test_layout_precision_and_moved_weights_have_graphs_of_their_own():
    network, recorder = Twice(), Fixed()
    ours, x = Graphed(network.forward, network, recorder), torch.ones(1, 2, 3, 4)
    with torch.inference_mode():
        for _ in range(2):
            ours(x), ours(x.contiguous(memory_format=torch.channels_last)), ours(x.double())
            with torch.autocast("cpu", torch.bfloat16):
                ours(x)
        assert len(recorder.recorded) == 4
        network.weight.data = torch.tensor([5.0])
        assert ours(x).unique().item() == ours(x).unique().item() == 5.0
        assert len(recorder.recorded) == 5


def test_where_none_can_be_recorded_one_line_says_so(capsys):
    network, recorder = Twice(), Fixed(broken=True)
    ours = Graphed(network.forward, network, recorder)
    with torch.inference_mode():
        assert [ours(torch.ones(1)).item() for _ in range(3)] == [2.0] * 3
    said = capsys.readouterr().err
    assert said == "graphs are left out, networks run as always: operation not permitted when stream is capturing\n"


def test_nothing_is_recorded_of_tensors_on_the_cpu():
    with torch.inference_mode():
        assert not Recorder().fits((torch.ones(1),))


@pytest.mark.parametrize("quality", [0, 60])
def test_a_codec_with_graphs_writes_and_reads_the_same(quality):
    codec, recorder = new_codec(), Fixed()
    images = [picture(40, 70), picture(64, 48), picture(40, 70, seed=5)]
    files = [codec.compress(image, quality) for image in images]
    expected = [codec.decompress(data) for data in files]
    use_graphs(codec, recorder)
    for _ in range(3):
        for image, data, decoded in zip(images, files, expected, strict=True):
            assert codec.compress(image, quality) == data
            assert torch.equal(codec.decompress(data), decoded)
    assert recorder.replayed >= 5 * 5
    assert sum(shapes[-1] == (2,) for shapes in recorder.recorded) == 2  # the noise, of two sizes
    other = copy.deepcopy(codec)
    with torch.no_grad():
        other.autoencoder.decoder.conv_out.bias.add_(0.5)
    assert not torch.equal(other.decompress(files[0]), expected[0])  # a copy runs its own weights
    assert torch.equal(codec.decompress(files[0]), expected[0])
    leave_graphs(codec)
    assert not any(isinstance(vars(module).get(name), Graphed) for module in codec.modules() for _, name in GRAPHED)


@pytest.mark.parametrize("weight", [0, 0.2])
def test_the_base_encoder_has_a_graph_however_its_indices_are_chosen(weight):
    codec = new_codec()
    codec.index_model = IndexModel(IndexNetwork(codec.params.vq_base.codebook_size))
    codec.choose_by_rate(weight)
    use_graphs(codec, Fixed())
    graphed, calls = vars(codec.vq_base)["encode"], []
    assert isinstance(graphed, Graphed)
    vars(codec.vq_base)["encode"] = lambda x: calls.append(x.shape) or graphed(x)
    codec.compress(picture(64, 48))
    assert len(calls) == 1


def test_fast_paths_of_cuda_are_on_unless_left_out(monkeypatch):
    codec = new_codec()
    assert not isinstance(vars(prepare(codec, "float32").unet).get("forward"), Graphed)  # on a CPU there are none
    monkeypatch.setattr(type(codec), "device", torch.device("cuda"))
    monkeypatch.setattr(fused_norm, "enabled", True)
    for without in (), ("graphs",), CUDA_PATHS, ():
        prepare(codec, "float32", without)
        assert fused_norm.enabled == ("fused_norm" not in without)
        assert isinstance(vars(codec.unet).get("forward"), Graphed) == ("graphs" not in without)
