import pytest

from polyvit_fast.config import MODELS, Model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Model(dim=100, num_heads=3), "dim = 100 does not divide by num_heads = 3"),
        (lambda: Model(depth=4, num_adaptor_layers=5), "num_adaptor_layers = 5 must lie between 0 and depth = 4"),
    ],
)
def test_wrong_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_model_table_is_that_of_the_papers():
    table = {name: (m.dim, m.mlp_dim, m.depth, m.num_heads) for name, m in MODELS.items()}
    assert table == {"Ti": (192, 768, 12, 3), "S": (384, 1536, 12, 6), "B": (768, 3072, 12, 12), "L": (1024, 4096, 24, 16)}
