"""What a report shows of the captured attention: contact sheets, figures, and a section of the page."""
