//! The canvas of charts, with one style for SVG and PNG.

use std::{error::Error, path::Path, sync::Once};

use anyhow::{Result, anyhow};
use plotters::{
    chart::{ChartContext, SeriesLabelPosition},
    coord::{CoordTranslate, Shift},
    prelude::{
        BLACK, BitMapBackend, DrawingArea, DrawingBackend, IntoDrawingArea as _, RGBColor, SVGBackend, WHITE,
    },
    style::{Color as _, FontStyle, register_font},
};

const SIZE: (u32, u32) = (1000, 560);

pub const FONT: &str = "sans-serif";

/// Distinguishable by colour-blind readers (Okabe and Ito).
pub const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 0, 0),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 158, 115),
    RGBColor(213, 94, 0),
    RGBColor(0, 114, 178),
    RGBColor(204, 121, 167),
];

/// A chart for both backends.
pub trait Picture {
    /// Draws the chart into the area.
    fn draw<'a, B: DrawingBackend + 'a>(
        &self,
        area: &DrawingArea<B, Shift>,
    ) -> Result<(), Box<dyn Error + 'a>>
    where
        B::ErrorType: 'a;
}

/// Writes `NAME.svg` and `NAME.png`.
///
/// # Errors
/// When a file cannot be written.
pub fn save(picture: &impl Picture, folder: &Path, name: &str) -> Result<()> {
    install_font()?;
    // The error type borrows the backend.
    let svg = folder.join(format!("{name}.svg"));
    picture
        .draw(&SVGBackend::new(&svg, SIZE).into_drawing_area())
        .map_err(|error| anyhow!("cannot draw {}: {error}", svg.display()))?;
    let png = folder.join(format!("{name}.png"));
    picture
        .draw(&BitMapBackend::new(&png, SIZE).into_drawing_area())
        .map_err(|error| anyhow!("cannot draw {}: {error}", png.display()))
}

/// Draws the legend of the series.
///
/// # Errors
/// When the backend cannot draw.
pub fn legend<'a, 'b, B: DrawingBackend + 'b, C: CoordTranslate>(
    chart: &mut ChartContext<'a, B, C>,
) -> Result<(), Box<dyn Error + 'b>>
where
    'b: 'a,
    B::ErrorType: 'b,
{
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .label_font((FONT, 15))
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK)
        .draw()?;
    Ok(())
}

/// Registers a font, so that charts do not depend on the system's.
fn install_font() -> Result<()> {
    static INSTALLED: Once = Once::new();
    let mut result = Ok(());
    INSTALLED.call_once(|| result = register_font(FONT, FontStyle::Normal, dejavu::sans::regular()));
    result.map_err(|_| anyhow!("the font is damaged"))
}
