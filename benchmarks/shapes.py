"""The shapes of real networks' parameters, in the order of `model.parameters()`."""

from math import prod


def resnet50() -> list[tuple[int, ...]]:
    """ResNet-50 for ImageNet (He et al., arXiv 1512.03385): 161 tensors, 25,557,032 elements."""

    def convolution(outputs: int, inputs: int, size: int) -> list[tuple[int, ...]]:
        # A convolution without bias, then the scale and shift of its batch normalisation.
        return [(outputs, inputs, size, size), (outputs,), (outputs,)]

    shapes = convolution(64, 3, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += convolution(width, inputs, 1)
            shapes += convolution(width, width, 3)
            shapes += convolution(4 * width, width, 1)
            if block == 0:
                shapes += convolution(4 * width, inputs, 1)
            inputs = 4 * width
    shapes += [(1000, 2048), (1000,)]
    assert len(shapes) == 161
    assert sum(map(prod, shapes)) == 25_557_032
    return shapes
