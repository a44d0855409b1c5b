import pytest

from tests.loss.engines import ENGINES, TRITON_ENGINES, Engine


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    return request.param


@pytest.fixture(scope="module", params=TRITON_ENGINES)
def triton_engine(request: pytest.FixtureRequest) -> Engine:
    return request.param
