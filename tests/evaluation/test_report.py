import numpy as np
from conftest import make_pipeline

from wbdit_diffusers.data import split_cells
from wbdit_diffusers.evaluation.report import TITLES, evaluate, log_normalise, to_markdown


def test_floors_stand_beside_the_generated_cells(pbmc):
    train, test = (pbmc[cells] for cells in split_cells(pbmc, 0.2, label_key="cell_type"))
    pipe = make_pipeline(train, space="program", label_keys=["cell_type"], num_genes=50)
    results = evaluate(pipe, train, test, num_seeds=1, num_inference_steps=2)
    assert list(results) == ["generated", "real: training cells", "real: halves of the held-out"]
    assert all(set(column) == set(TITLES) for column in results.values())
    assert all(np.isfinite(values).all() for column in results.values() for values in column.values())
    # An untrained model is told from real cells; real cells are not.
    aucs = [results[name]["rf_auc"][0] for name in results]
    assert aucs[0] > 0.9 and 0.35 < aucs[1] < 0.65 and 0.25 < aucs[2] < 0.75
    table = to_markdown(results, test.n_obs)
    assert f"Against {test.n_obs} held-out cells" in table
    assert len(table.splitlines()) == 4 + len(TITLES)


def test_log_normalise_leaves_its_input_alone(pbmc):
    before = pbmc.X.copy()
    x = log_normalise(pbmc)
    assert (pbmc.X != before).nnz == 0
    np.testing.assert_allclose(np.expm1(x).sum(1), 1e4, rtol=1e-4)
