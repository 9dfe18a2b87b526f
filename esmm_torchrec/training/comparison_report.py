def format_table(results):
    return ""


def write_report(results, out):
    pass
