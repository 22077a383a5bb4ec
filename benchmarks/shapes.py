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


def vgg16() -> list[tuple[int, ...]]:
    """The 32 parameters of VGG-16 for 1000 classes (Simonyan and Zisserman, 2014).

    Example:
        >>> len(vgg16()), sum(map(prod, vgg16()))
        (32, 138357544)
    """
    shapes: list[tuple[int, ...]] = []
    channels = 3
    for width, layers in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(layers):
            shapes += [(width, channels, 3, 3), (width,)]
            channels = width
    for out, into in ((4096, 512 * 7 * 7), (4096, 4096), (1000, 4096)):
        shapes += [(out, into), (out,)]
    return shapes


def bert_large() -> list[tuple[int, ...]]:
    """The 391 parameters of BERT-Large, uncased, with its pooler (Devlin et al., 2018).

    Example:
        >>> len(bert_large()), sum(map(prod, bert_large()))
        (391, 335141888)
    """
    d, inner = 1024, 4096
    shapes: list[tuple[int, ...]] = [(30522, d), (512, d), (2, d), (d,), (d,)]
    for _ in range(24):
        shapes += [(d, d), (d,)] * 4 + [(d,), (d,)]
        shapes += [(inner, d), (inner,), (d, inner), (d,), (d,), (d,)]
    return [*shapes, (d, d), (d,)]


def llama_7b() -> list[tuple[int, ...]]:
    """The 291 parameters of LLaMA-7B (Touvron et al., 2023).

    Example:
        >>> len(llama_7b()), sum(map(prod, llama_7b()))
        (291, 6738415616)
    """
    d, inner, words = 4096, 11008, 32000
    layer = [(d, d)] * 4 + [(inner, d), (inner, d), (d, inner), (d,), (d,)]
    return [(words, d), *layer * 32, (d,), (words, d)]
