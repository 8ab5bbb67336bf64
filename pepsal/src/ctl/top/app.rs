//! The state of `pepsal top`, and its keys.

use std::time::Duration;

use anyhow::{Result, bail};
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use crate::{
    ctl::{client::Client, top::history::History},
    observe::protocol::{Answer, Flows, FlowsQuestion, Question, Sort, Status},
};

/// Status and flows at one moment.
pub struct Picture {
    pub status: Status,
    pub flows: Flows,
}

impl Picture {
    /// Requests status and flows, which takes `interval`.
    pub fn ask(client: &mut Client, interval: Duration) -> Result<Self> {
        let question = FlowsQuestion {
            interval_ms: interval.as_millis().try_into().unwrap_or(u64::MAX),
            ..Default::default()
        };
        let Answer::Flows(flows) = client.ask(Question::Flows(question))? else {
            bail!("unexpected reply of the daemon");
        };
        let Answer::Status(status) = client.ask(Question::Status)? else {
            bail!("unexpected reply of the daemon");
        };
        Ok(Self {
            status: *status,
            flows,
        })
    }
}

pub struct App {
    pub picture: Option<Picture>,
    /// Error of the last request.
    pub trouble: Option<String>,
    pub history: History,
    pub sort: Sort,
    /// Index of the first shown flow.
    pub offset: usize,
}

impl App {
    pub fn new(sort: Sort) -> Self {
        Self {
            picture: None,
            trouble: None,
            history: History::default(),
            sort,
            offset: 0,
        }
    }

    pub fn update(&mut self, asked: Result<Picture>) {
        match asked {
            Ok(picture) => {
                self.history.add(&picture.flows);
                self.picture = Some(picture);
                self.trouble = None;
                self.arrange();
            }
            Err(error) => self.trouble = Some(format!("{error:#}")),
        }
    }

    pub fn arrange(&mut self) {
        if let Some(picture) = &mut self.picture {
            let by = self.sort;
            let list = &mut picture.flows.list;
            list.sort_by(|a, b| by.key(b).total_cmp(&by.key(a)));
            self.offset = self.offset.min(list.len().saturating_sub(1));
        }
    }

    /// Handles a key; returns whether it ends the program.
    pub fn is_last(&mut self, key: KeyEvent) -> bool {
        let page = 10;
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return true,
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return true,
            KeyCode::Char('a') => self.sort = Sort::Age,
            KeyCode::Char('b') => self.sort = Sort::Bytes,
            KeyCode::Char('r') => self.sort = Sort::Rate,
            KeyCode::Char('t') => self.sort = Sort::Rtt,
            KeyCode::Char('x') => self.sort = Sort::Retransmits,
            KeyCode::Down => self.offset += 1,
            KeyCode::Up => self.offset = self.offset.saturating_sub(1),
            KeyCode::PageDown => self.offset += page,
            KeyCode::PageUp => self.offset = self.offset.saturating_sub(page),
            KeyCode::Home => self.offset = 0,
            _ => {}
        }
        self.arrange();
        false
    }
}
