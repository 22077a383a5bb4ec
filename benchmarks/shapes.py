"""Parameter shapes of real models, so that benchmarks need no model library."""

from math import prod


def resnet50() -> list[tuple[int, ...]]:
    """The 161 parameters of ResNet-50 for 1000 classes (He et al., 2015), in order of use.

    Example:
        >>> shapes = resnet50()
        >>> len(shapes), sum(map(prod, shapes)), shapes[0], shapes[-1]
        (161, 25557032, (64, 3, 7, 7), (1000,))
    """
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for shape in ((width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [shape, shape[:1], shape[:1]]
            if block == 0:
                shapes += [(4 * width, channels, 1, 1), (4 * width,), (4 * width,)]
            channels = 4 * width
    shapes += [(1000, channels), (1000,)]
    assert (len(shapes), sum(map(prod, shapes))) == (161, 25_557_032)
    return shapes


def resnet18() -> list[tuple[int, ...]]:
    """The 62 parameters of ResNet-18 for 1000 classes (He et al., 2015), in order of use.

    Example:
        >>> len(resnet18()), sum(map(prod, resnet18()))
        (62, 11689512)
    """
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width in (64, 128, 256, 512):
        for entering in (channels, width):
            shapes += [(width, entering, 3, 3), (width,), (width,)]
            shapes += [(width, width, 3, 3), (width,), (width,)]
            if entering != width:
                shapes += [(width, entering, 1, 1), (width,), (width,)]
        channels = width
    shapes += [(1000, channels), (1000,)]
    assert (len(shapes), sum(map(prod, shapes))) == (62, 11_689_512)
    return shapes
