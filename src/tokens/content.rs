//! Whether a chat template wants a message's content as text or as a list of parts.
//!
//! vLLM decides it by the template's syntax: a template that loops over the content of a message
//! gets parts. The same rule here, over minijinja's syntax tree, so that both sides flatten alike.

use std::collections::BTreeSet;

use minijinja::machinery::ast::{Call, CallArg, Expr, ForLoop, Macro, Stmt};
use minijinja::machinery::parse;

use super::template::syntax;

/// How messages are handed to a template.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ContentFormat {
    /// Text parts joined by line breaks.
    #[default]
    String,
    /// A list of `{type, text}`.
    OpenAi,
}

/// What this template wants. `source` must be one that compiles; otherwise it is text.
pub fn detect(source: &str) -> ContentFormat {
    let Ok(Stmt::Template(template)) = parse(source, "chat", syntax()) else {
        return ContentFormat::String;
    };
    let mut found = Found::default();
    template.children.iter().for_each(|stmt| found.stmt(stmt, None));
    if found.loops_over_content() { ContentFormat::OpenAi } else { ContentFormat::String }
}

/// The parts of a template that matter here, in the order in which they stand.
#[derive(Default)]
struct Found<'t, 'a> {
    /// `set` of a plain name.
    assignments: Vec<(&'a str, &'t Expr<'a>)>,
    /// Loops, each with the macro that it stands in.
    loops: Vec<(&'t ForLoop<'a>, Option<usize>)>,
    macros: Vec<&'t Macro<'a>>,
    calls: Vec<&'t Call<'a>>,
}

impl<'t, 'a> Found<'t, 'a> {
    fn stmts(&mut self, stmts: &'t [Stmt<'a>], inside: Option<usize>) {
        stmts.iter().for_each(|stmt| self.stmt(stmt, inside));
    }

    fn stmt(&mut self, stmt: &'t Stmt<'a>, inside: Option<usize>) {
        match stmt {
            Stmt::Template(t) => self.stmts(&t.children, inside),
            Stmt::EmitExpr(e) => self.expr(&e.expr),
            Stmt::ForLoop(l) => {
                self.loops.push((l, inside));
                self.expr(&l.iter);
                l.filter_expr.iter().for_each(|e| self.expr(e));
                self.stmts(&l.body, inside);
                self.stmts(&l.else_body, inside);
            }
            Stmt::IfCond(c) => {
                self.expr(&c.expr);
                self.stmts(&c.true_body, inside);
                self.stmts(&c.false_body, inside);
            }
            Stmt::WithBlock(w) => {
                w.assignments.iter().for_each(|(_, e)| self.expr(e));
                self.stmts(&w.body, inside);
            }
            Stmt::Set(s) => {
                if let Expr::Var(name) = &s.target {
                    self.assignments.push((name.id, &s.expr));
                }
                self.expr(&s.expr);
            }
            Stmt::SetBlock(s) => self.stmts(&s.body, inside),
            Stmt::AutoEscape(b) => self.stmts(&b.body, inside),
            Stmt::FilterBlock(b) => self.stmts(&b.body, inside),
            Stmt::Block(b) => self.stmts(&b.body, inside),
            Stmt::Macro(m) => {
                self.macros.push(m);
                let this = Some(self.macros.len() - 1);
                self.stmts(&m.body, this);
            }
            Stmt::CallBlock(c) => {
                self.call(&c.call);
                self.stmts(&c.macro_decl.body, inside);
            }
            Stmt::Do(d) => self.call(&d.call),
            _ => {}
        }
    }

    fn call(&mut self, call: &'t Call<'a>) {
        self.calls.push(call);
        self.expr(&call.expr);
        self.args(&call.args);
    }

    fn args(&mut self, args: &'t [CallArg<'a>]) {
        for arg in args {
            let (CallArg::Pos(e) | CallArg::Kwarg(_, e) | CallArg::PosSplat(e) | CallArg::KwargSplat(e)) =
                arg;
            self.expr(e);
        }
    }

    fn expr(&mut self, expr: &'t Expr<'a>) {
        match expr {
            Expr::Var(_) | Expr::Const(_) => {}
            Expr::Slice(s) => {
                self.expr(&s.expr);
                [&s.start, &s.stop, &s.step].into_iter().flatten().for_each(|e| self.expr(e));
            }
            Expr::UnaryOp(u) => self.expr(&u.expr),
            Expr::BinOp(b) => {
                self.expr(&b.left);
                self.expr(&b.right);
            }
            Expr::Compare(c) => {
                self.expr(&c.expr);
                c.ops.iter().for_each(|op| self.expr(&op.expr));
            }
            Expr::IfExpr(i) => {
                self.expr(&i.test_expr);
                self.expr(&i.true_expr);
                i.false_expr.iter().for_each(|e| self.expr(e));
            }
            Expr::Filter(f) => {
                f.expr.iter().for_each(|e| self.expr(e));
                self.args(&f.args);
            }
            Expr::Test(t) => {
                self.expr(&t.expr);
                self.args(&t.args);
            }
            Expr::GetAttr(a) => self.expr(&a.expr),
            Expr::GetItem(i) => {
                self.expr(&i.expr);
                self.expr(&i.subscript_expr);
            }
            Expr::Call(c) => self.call(c),
            Expr::List(l) => l.items.iter().for_each(|e| self.expr(e)),
            Expr::Tuple(t) => t.items.iter().for_each(|e| self.expr(e)),
            Expr::Map(m) => m.keys.iter().chain(&m.values).for_each(|e| self.expr(e)),
        }
    }

    fn loops_over_content(&self) -> bool {
        // Names of the list of messages, then of one message.
        let mut lists = BTreeSet::from(["messages"]);
        loop {
            let more: Vec<&str> = self
                .assignments
                .iter()
                .filter(|(name, value)| {
                    !lists.contains(name) && lists.iter().any(|list| is_access(value, list, None))
                })
                .map(|(name, _)| *name)
                .collect();
            if more.is_empty() {
                break;
            }
            lists.extend(more);
        }
        let messages: BTreeSet<&str> = self
            .loops
            .iter()
            .filter(|(l, _)| lists.iter().any(|list| is_access(&l.iter, list, None)))
            .filter_map(|(l, _)| name_of(&l.target))
            .collect();
        let is_content = |e: &Expr<'_>| messages.iter().any(|message| is_access(e, message, Some("content")));
        self.loops.iter().any(|(l, inside)| {
            let Some(iterated) = name_of(&l.iter) else { return is_content(&l.iter) };
            match inside {
                None => iterated == "content",
                Some(at) => self.takes_content(self.macros[*at], iterated, &is_content),
            }
        })
    }

    /// Whether a message's content is handed to the macro as this parameter.
    fn takes_content(
        &self,
        taker: &Macro<'_>,
        parameter: &str,
        is_content: &dyn Fn(&Expr<'_>) -> bool,
    ) -> bool {
        let Some(place) = taker.args.iter().position(|arg| name_of(arg) == Some(parameter)) else {
            return false;
        };
        let calls = self.calls.iter().filter(|call| name_of(&call.expr) == Some(taker.name));
        calls.into_iter().any(|call| {
            let mut positions = 0;
            call.args.iter().any(|arg| match arg {
                CallArg::Pos(e) => {
                    positions += 1;
                    positions == place + 1 && is_content(e)
                }
                CallArg::Kwarg(name, e) => *name == parameter && is_content(e),
                _ => false,
            })
        })
    }
}

fn name_of<'a>(expr: &Expr<'a>) -> Option<&'a str> {
    match expr {
        Expr::Var(name) => Some(name.id),
        _ => None,
    }
}

/// Whether it is the variable (or a member of it) itself, filtered, tested or sliced.
fn is_access(expr: &Expr<'_>, variable: &str, member: Option<&str>) -> bool {
    match (expr, member) {
        (Expr::Filter(f), _) => f.expr.as_ref().is_some_and(|e| is_access(e, variable, member)),
        (Expr::Test(t), _) => is_access(&t.expr, variable, member),
        (Expr::Slice(s), _) => is_access(&s.expr, variable, member),
        (Expr::Var(name), None) => name.id == variable,
        (Expr::GetAttr(a), Some(member)) => a.name == member && name_of(&a.expr) == Some(variable),
        (Expr::GetItem(i), Some(member)) => {
            let key = matches!(&i.subscript_expr, Expr::Const(c) if c.value.as_str() == Some(member));
            key && name_of(&i.expr) == Some(variable)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_that_loops_over_content_wants_parts() {
        for source in [
            "{% for message in messages %}{% for part in message['content'] %}x{% endfor %}{% endfor %}",
            "{% set rest = messages[1:] %}{% for m in rest %}{% for p in m.content | list %}x{% endfor %}{% endfor %}",
            "{% for m in messages %}{% set content = m.content %}{% for p in content %}{% endfor %}{% endfor %}",
            "{% macro show(c) %}{% for p in c %}{% endfor %}{% endmacro %}{% for m in messages %}{{ show(m.content) }}{% endfor %}",
            "{% macro show(a, c) %}{% for p in c %}{% endfor %}{% endmacro %}{% for m in messages %}{{ show(1, c=m['content']) }}{% endfor %}",
        ] {
            assert_eq!(detect(source), ContentFormat::OpenAi, "{source}");
        }
        for source in [
            "{% for message in messages %}{{ message['content'] }}{% endfor %}",
            "{% for m in messages %}{% for t in m.tool_calls %}{% endfor %}{% endfor %}",
            "{% macro show(c) %}{% for p in c %}{% endfor %}{% endmacro %}{% for m in messages %}{{ show(m.tools) }}{% endfor %}",
            "{% macro show(content) %}{% for p in content %}{% endfor %}{% endmacro %}x",
            "{{ broken",
        ] {
            assert_eq!(detect(source), ContentFormat::String, "{source}");
        }
    }
}
