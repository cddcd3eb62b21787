"""`torch.compile` takes the encoder and the field as one graph each."""

import pytest
import torch
from torch.testing import assert_close

# Of that one release of Python.
pytestmark = pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.parametrize("merged", [False, True])
def test_the_encoder_is_one_graph(from_sam, inputs, merged):
    model = from_sam().eval()
    if merged:
        model.merge_and_unload()
    expected = model.get_image_embeddings(inputs["pixel_values"])
    encode = torch.compile(model.get_image_embeddings, fullgraph=True, backend="eager")
    assert_close(encode(inputs["pixel_values"]), expected)


@torch.no_grad()
def test_the_encoder_of_padded_images_is_compiled_around_their_spectra(from_sam, inputs):
    """Each is taken of an image of another size: a break in the graph, not an error."""
    model = from_sam().eval()
    arguments = inputs["pixel_values"], torch.tensor([[64, 40], [64, 64]])
    expected = model.get_image_embeddings(*arguments)
    assert_close(torch.compile(model.get_image_embeddings, backend="eager")(*arguments), expected)
    assert (expected != model.get_image_embeddings(inputs["pixel_values"])).any()


@torch.no_grad()
@pytest.mark.parametrize(
    "values",
    [{}, {"num_labels": 3}, {"selection": None}, {"selection": "top_k"}, {"uncertainty": "monte_carlo"}],
    ids=str,
)
def test_the_field_is_one_graph_for_all_images(from_sam, inputs, values):
    model, graphs = from_sam(**values).eval(), []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    evaluate = torch.compile(lambda field, points: field(points), fullgraph=True, backend=backend)
    for image in range(2):
        embeddings = model.get_image_embeddings(inputs["pixel_values"][image, None])
        field = model.get_mask_field(embeddings, inputs["input_boxes"][image, None])
        points = 2 * torch.rand(1, 2, 50, 2, generator=torch.Generator().manual_seed(image)) - 1
        assert_close(evaluate(field, points), field(points))
    assert len(graphs) == 1
