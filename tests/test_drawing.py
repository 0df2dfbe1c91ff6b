import pytest
import torch
from torch import Tensor

from lightning_kd.drawing import FIRST, GREY, coloured, dotted, enlarged, framed, looks, palette


def test_normalised_images_look_as_before() -> None:
    bytes_ = torch.randint(0, 256, (2, 3, 6, 5), dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    shift, scale = (torch.tensor(each).view(3, 1, 1) for each in (mean, std))
    for images in (bytes_, bytes_ / 255, (bytes_ / 255 - shift) / scale, list(bytes_)):
        seen = looks(images, mean, std)
        assert seen is not None
        assert torch.equal(torch.stack(seen), bytes_)


def test_images_of_which_nothing_is_known_are_stretched() -> None:
    (seen,) = looks(torch.linspace(-2.0, 3.0, 16).view(1, 1, 4, 4)) or []
    assert seen.shape == (3, 4, 4)
    assert (seen.min(), seen.max()) == (0, 255)
    (flat,) = looks(torch.full((1, 3, 2, 2), -1.0)) or []
    assert flat.unique().tolist() == [0]


@pytest.mark.parametrize("nothing", [torch.zeros(2, 4), torch.zeros(1, 4, 8, 8), ["a"], [], None])
def test_what_is_no_image_has_no_look(nothing: object) -> None:
    assert looks(nothing) is None


def test_colours_are_told_apart() -> None:
    colours = torch.tensor([*FIRST, GREY]).double()
    distance = torch.cdist(colours, colours).fill_diagonal_(1000)
    assert distance.min() > 50
    assert palette(3) == list(FIRST[:3])


def hue(pixels: Tensor, colour: tuple[int, int, int]) -> bool:
    """Whether pixels ``(3, n)`` are nearer to a colour than to grey."""
    off = (pixels.double() - torch.tensor(colour).view(3, 1)).norm(dim=0)
    return bool((off < 75).all())


def test_masks_cover_their_pixels_and_nothing_else() -> None:
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    masks = torch.zeros(2, 40, 50, dtype=torch.bool)
    masks[0, :10], masks[1, 30:] = True, True
    left_out = torch.zeros(40, 50, dtype=torch.bool)
    left_out[15:20] = True
    picture = coloured(image, masks, FIRST[:2], left_out)
    _, factor = enlarged(image)
    small = picture[:, ::factor, ::factor]
    assert hue(small[:, :10].flatten(1), FIRST[0])
    assert hue(small[:, 30:].flatten(1), FIRST[1])
    assert (small[:, 20:30] == small[:1, 20:30]).all()  # grey
    assert small[0, 15:20].float().std() > 30  # stripes


def test_boxes_are_where_they_belong() -> None:
    image = torch.full((3, 40, 50), 200, dtype=torch.uint8)
    boxes = torch.tensor([[10.0, 10.0, 30.0, 30.0]])
    picture, factor = framed(image, boxes, [""], [FIRST[1]]), enlarged(image)[1]
    changed = (picture != 200).any(dim=0).nonzero()
    assert (changed.amin(0) / factor - 10).abs().max() < 0.5
    assert (changed.amax(0) / factor - 30).abs().max() < 0.5
    assert torch.equal(framed(image, boxes[:0], [], []), enlarged(image)[0])
    written = framed(image, boxes, ["0.50"], [FIRST[1]])
    assert not torch.equal(written, picture)


def test_dots_are_where_the_points_are_and_lines_between() -> None:
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    assert dotted(image, torch.zeros(0, 2), FIRST[0]) is image
    dots = dotted(image, torch.tensor([[10.0, 20.0], [50.0, 5.0]]), FIRST[0], radius=2)
    assert tuple(dots[:, 20, 10].tolist()) == tuple(dots[:, 5, 50].tolist()) == FIRST[0]
    assert not dots[:, :, 20:40].any()
    line = dotted(image, torch.tensor([[10.0, 20.0]]), FIRST[0], radius=1, joined=torch.tensor([[50.0, 20.0]]))
    assert line[:, 20, 10:50].any(dim=0).all()
    assert not line[:, 30:].any()
