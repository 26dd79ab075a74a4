from .archive import (
    read_results as read_results,
)
from .archive import (
    write_draws as write_draws,
)
from .archive import (
    write_report as write_report,
)
from .archive import (
    write_results as write_results,
)
from .figures import (
    ReportFigure as ReportFigure,
)
from .figures import (
    report_figures as report_figures,
)
from .table import (
    lineage_table as lineage_table,
)
from .verdict import (
    verdict as verdict,
)
