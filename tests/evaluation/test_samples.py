import anndata as ad
import numpy as np
import pandas as pd
import pytest

from wbdit_diffusers.evaluation.samples import cells_to_judge


def test_cells_to_judge(caplog):
    test = ad.AnnData(np.zeros((4, 1)), obs=pd.DataFrame({"t": ["a", "b", "a", "c"]}, index=list("wxyz")))
    known = np.array([True, True, True, False])
    assert cells_to_judge(test, known).obs_names.tolist() == ["w", "x", "y"]
    assert cells_to_judge(test, ~known | known, max_cells=2).n_obs == 2
    with pytest.raises(ValueError, match="No held-out cell has labels that training knows"):
        cells_to_judge(test, ~known & known)
