"""The models that bench/h200_models.py times are what they are said to be."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def test_the_hunyuan_encoder_is_that_of_transformers():
    from transformers.models.hunyuan_vl.configuration_hunyuan_vl import HunYuanVLVisionConfig
    from transformers.models.hunyuan_vl.modeling_hunyuan_vl import HunYuanVLVisionTransformer

    from bench.models.sources import HunyuanVision

    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = HunYuanVLVisionConfig(**sizes, text_hidden_size=40, max_image_size=128)
    torch.manual_seed(0)
    theirs = HunYuanVLVisionTransformer(config).eval()
    for value in theirs.parameters():
        torch.nn.init.normal_(value, std=0.2)
    ours = HunyuanVision(image=64, hidden=48, inner=80, layers=2, heads=4, text=40, edge=8).eval()
    known = theirs.state_dict()
    renamed = {
        name.removeprefix("embeddings.")
        .removeprefix("patch_merger.")
        .replace("self_attn.", "")
        .replace("mlp.fc", "fc"): value
        for name, value in known.items()
    }
    table = renamed.pop("position_embedding.weight")[1:].reshape(1, 8, 8, 48).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(table, size=(4, 4), mode="bilinear", align_corners=False)
    renamed["position"] = grid.flatten(2).transpose(1, 2)
    del renamed["image_sep"]
    ours.load_state_dict(renamed)
    image = torch.randn(2, 3, 64, 64)
    patches = image.reshape(2, 3, 4, 16, 4, 16).permute(0, 2, 4, 1, 3, 5).reshape(32, 768)
    with torch.inference_mode():
        expected = theirs(patches, torch.tensor([[1, 4, 4]] * 2)).pooler_output.reshape(2, -1, 40)
        torch.testing.assert_close(ours(image), expected, rtol=1e-4, atol=1e-5)
