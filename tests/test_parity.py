"""The networks against the reference's own numbers. Run with -s to see how far off each tensor is."""

import json

import numpy as np
import pytest
import torch

from models import diffusion
from models.autoencoder import Autoencoder, AutoencoderParams
from models.blocks import nearest_codes
from models.diffusion import DiffusionParams, Schedule
from models.swin import shifted_window_mask
from models.unet import UNet, UNetParams
from models.vq_base import VQBase, VQBaseParams, perplexity
from tests.parity import (
    EMA_RELATIVE,
    Fixture,
    compare,
    compare_picture,
    fixture_file,
    seed_parameters,
    splitmix_stream,
)

SMALL_UNET = dict(latent_channels=64, condition_channels=64, condition_width=16, model_channels=32, swin_embed_dim=64)
SMALL_AUTOENCODER = AutoencoderParams(ch=32, z_channels=64, embed_dim=64, n_embed=128)
SMALL_BASE = VQBaseParams(ch=32, z_channels=64, embed_dim=64, in_channels=64, codebook_size=64)


def network(cls, params, weights):
    """A network in evaluation mode with exactly these weights."""
    net = cls(params).eval()
    net.load_state_dict(weights, strict=True)
    return net


def fixture_id(name: str):
    """The decorator of a test without parameters: its id names the fixture's file."""
    return pytest.mark.parametrize((), [pytest.param(id=name)])


def fixture_named(name: str):
    return pytest.fixture(scope="module", name=name)(lambda: Fixture(name))


unet_small, gt_autoencoder_small, latent_vq_small, full_seeded = map(
    fixture_named, ("unet_small", "gt_autoencoder_small", "latent_vq_small", "full_seeded")
)


@pytest.mark.parametrize(
    "case",
    ["a_16x16", "a_16x48", "a_32x16", "a_16x16_lq8x8", "b_32x32"],
    ids=lambda case: f"unet_small.safetensors-{case}",
)
@torch.inference_mode()
def test_unet(unet_small, case):
    weights = unet_small.weights()
    windows = (4, 4, 4, 2)
    if case.startswith("b_"):
        weights |= unet_small.weights("variant_b/")
        windows = (4, 4, 4, 4)
    net = network(UNet, UNetParams(**SMALL_UNET, windows=windows), weights)
    x, lq, t = (unet_small[f"in/{case}/{name}"] for name in ("x", "lq", "timesteps"))
    compare(f"unet_small {case}", net(x, t, lq), unet_small[f"out/{case}"])


@pytest.mark.parametrize(
    "window, shift, height, width",
    [(4, 0, 8, 12), (4, 2, 8, 12), (2, 1, 4, 6)],
    ids=[f"unet_small.safetensors-mask-{name}" for name in ("4-unshifted", "4-shifted", "2-shifted")],
)
def test_attention_mask(unet_small, window, shift, height, width):
    reference = unet_small[f"mask/window{window}_shift{shift}_{height}x{width}"]
    assert torch.equal(shifted_window_mask(height, width, window, shift), reference)


@fixture_id("gt_autoencoder_small.safetensors")
@torch.inference_mode()
def test_autoencoder(gt_autoencoder_small):
    f = gt_autoencoder_small
    net = network(Autoencoder, SMALL_AUTOENCODER, f.weights())
    image = f["in/image"]
    compare("gt_autoencoder_small encoder", net.encoder(image), f["out/encoder"])
    latent = net.encode(image)
    compare("gt_autoencoder_small pre_quant", latent, f["out/pre_quant"])
    compare_picture("gt_autoencoder_small decoded", net.decode(latent), f["out/decoded_from_pre_quant"])
    from_codes = net.decode(f["out/quantized"])
    compare_picture("gt_autoencoder_small from codes", from_codes, f["out/decoded_from_quantized"])


@fixture_id("latent_vq_small.safetensors")
@torch.inference_mode()
def test_vq_base(latent_vq_small):
    f = latent_vq_small
    net = network(VQBase, SMALL_BASE, f.weights())
    code = net(f["in/latent"])
    compare("latent_vq_small pre_quant", code.z, f["out/pre_quant"])
    assert torch.equal(code.indices.flatten(), f["out/indices"])
    compare("latent_vq_small quantized", code.z_q, f["out/quantized"])
    compare("latent_vq_small decoded", net.reconstruct(code.z_q), f["out/decoded"])
    compare("latent_vq_small from indices", net.reconstruct(net.rows(code.indices)), f["out/decoded"])
    compare("latent_vq_small commit_loss", 0.25 * (code.z_q - code.z).square().mean(), f["out/commit_loss"])
    compare("latent_vq_small perplexity", perplexity(code.counts), f["out/perplexity"], limit=1e-4, rms_limit=1e-4)


@pytest.mark.parametrize("start", ["warm", "fresh"], ids=lambda s: f"latent_vq_small.safetensors-ema-{s}")
def test_codebook_update(latent_vq_small, start):
    f = latent_vq_small
    net = network(VQBase, SMALL_BASE, f.weights())
    book = net.quantize.embedding
    names = {"weight": "codebook", "cluster_size": "cluster_size", "embed_avg": "embed_avg"}
    for ours, theirs in names.items():
        getattr(book, ours).data.copy_(f[f"ema/{start}_before/{theirs}"])
    vectors = f["ema/input"].permute(0, 2, 3, 1).flatten(0, 2)
    for step in (1, 2):
        k = nearest_codes(vectors, book.weight)
        assert torch.equal(k, f[f"ema/{start}_step{step}_indices"])
        net.quantize.update(*net._statistics(vectors, k))
        for ours, theirs in names.items():
            reference = f[f"ema/{start}_after{step}/{theirs}"]
            limit = EMA_RELATIVE * reference.abs().max().item()
            compare(f"ema {start} {step} {theirs}", getattr(book, ours), reference, limit, limit)


@fixture_id("pipeline_small.safetensors")
@torch.inference_mode()
def test_pipeline(unet_small, gt_autoencoder_small, latent_vq_small):
    f = Fixture("pipeline_small")
    autoencoder = network(Autoencoder, SMALL_AUTOENCODER, gt_autoencoder_small.weights())
    base = network(VQBase, SMALL_BASE, latent_vq_small.weights())
    unet = network(UNet, UNetParams(**SMALL_UNET), unet_small.weights())
    params = DiffusionParams()
    schedule = Schedule.exponential(params)

    x = autoencoder.encode((f["in/image_uint8"].float() / 255 - 0.5) / 0.5)
    compare("pipeline_small z_start", x, f["out/z_start"])
    code = base(x)
    assert torch.equal(code.indices.flatten(), f["out/indices"])
    compare("pipeline_small z_y", code.z_q, f["out/z_y"])
    y = base.reconstruct(code.z_q)
    compare("pipeline_small z_y_start", y, f["out/z_y_start"])
    eta, noise = torch.tensor([params.etas_end**2], dtype=torch.float64), f["in/noise"]
    noisy = diffusion.prior_sample(y, eta, params.kappa, noise)
    compare("pipeline_small z_sample", noisy, f["out/z_sample"])
    compare("pipeline_small unet_input", diffusion.scale_input(noisy, eta, params.kappa), f["out/unet_input"])
    predicted = diffusion.one_step(unet, noisy, code.z_q, eta, params)
    compare("pipeline_small pred_xstart", predicted, f["out/pred_xstart"])
    compare_picture("pipeline_small image", autoencoder.decode(predicted), f["out/image_before_clamp"])

    for t in (1, 0):
        step = torch.tensor([t])
        x_0 = diffusion.predict(schedule, unet, noisy, step, code.z_q)
        noisy = diffusion.ddim_step(schedule, noisy, x_0, y, step)
        compare(f"pipeline_small two steps t={t}", noisy, f[f"out/ddim_two_step_sample_t{t}"])
    sampled = diffusion.sample(schedule, unet, y, code.z_q, lambda: noise, ddim=True)
    compare("pipeline_small whole chain", sampled, f["out/ddim_two_step_sample_t0"])


def seeded(f, cls, params, name):
    """A network at full width, filled by the fixture's formula."""
    net, info = cls(params).eval(), f.info["networks"][name] if "networks" in f.info else f.info[name]
    digest = seed_parameters(net, info["stream_tag"], info["left_out"])
    assert digest == info["sha256_of_float32_bytes_in_sorted_key_order"], f"{name}: the formula was not followed"
    return net


def seeded_input(case):
    """An input of the fixture that is given by its stream, amplitude and grid."""
    u = splitmix_stream(case["stream"], int(np.prod(case["shape"])))
    values = np.round(case["amplitude"] * u / case["grid"]) * case["grid"]
    return torch.from_numpy(values.astype(np.float32)).view(case["shape"])


@pytest.fixture(scope="module")
def full_unet(full_seeded):
    with torch.inference_mode():
        return seeded(full_seeded, UNet, UNetParams(), "UNet")


@fixture_id("full_seeded.safetensors")
@torch.inference_mode()
def test_full_width(full_seeded, full_unet):
    """The whole chain, each network fed with what the one before it gave."""
    f = full_seeded
    autoencoder = seeded(f, Autoencoder, AutoencoderParams(), "GT_encoder")
    x = autoencoder.encode((f["in/image_uint8"].float() / 255 - 0.5) / 0.5)
    compare("full_seeded z_start", x, f["out/z_start"])

    base = seeded(f, VQBase, VQBaseParams(), "autoencoder")
    code = base(x)
    compare("full_seeded latent_pre_quant", code.z, f["out/latent_pre_quant"])
    assert torch.equal(code.indices.flatten(), f["out/indices"])
    compare("full_seeded z_y", code.z_q, f["out/z_y"])
    y = base.reconstruct(code.z_q)
    compare("full_seeded z_y_start", y, f["out/z_y_start"])

    params = DiffusionParams()
    eta = torch.tensor([params.etas_end**2], dtype=torch.float64)
    noisy = diffusion.prior_sample(y, eta, params.kappa, f["in/noise"])
    predicted = diffusion.one_step(full_unet, noisy, code.z_q, eta, params)
    compare("full_seeded pred_xstart", predicted, f["out/pred_xstart"])
    compare_picture("full_seeded image", autoencoder.decode(predicted), f["out/image_before_clamp"])


@fixture_id("full_seeded.safetensors")
@torch.inference_mode()
def test_full_width_of_a_wide_latent(full_seeded, full_unet):
    case = full_seeded.info["unet_16x32"]
    wide = full_unet(seeded_input(case["x"]), torch.tensor(case["timesteps"]), seeded_input(case["lq"]))
    compare("full_seeded unet_16x32", wide, full_seeded["out/unet_16x32"])


@pytest.mark.parametrize(
    "cls, params, name",
    [
        pytest.param(UNet, UNetParams(), "UNet", id="keys_full.json-UNet"),
        pytest.param(VQBase, VQBaseParams(), "autoencoder", id="keys_full.json-autoencoder"),
        pytest.param(Autoencoder, AutoencoderParams(), "GT_encoder", id="keys_full.json-GT_encoder"),
    ],
)
def test_published_keys(cls, params, name):
    entries = json.loads(fixture_file("keys_full.json").read_text())[name]["state_dict"]
    with torch.device("meta"):
        ours = {k: list(v.shape) for k, v in cls(params).state_dict().items()}
    assert ours == {k: v["shape"] for k, v in entries.items() if v["kind"] == "parameter"}
